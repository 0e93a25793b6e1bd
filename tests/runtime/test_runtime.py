from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from quantrack.errors import QuantrackError, UsageError
from quantrack.onnx.export import export_float
from quantrack.runtime.latency import measure_in_turns, measure_latency
from quantrack.runtime.load import OtherLoad, peak_memory_mb, watch_other_load
from quantrack.runtime.parity import match_rows, measure_parity, torch_network
from quantrack.runtime.placement import measure_placement
from quantrack.runtime.session import Session, SessionSettings, _say_once, open_session
from quantrack.runtime.tune import candidates, tune


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(2)).eval()


@pytest.fixture
def session(net: nn.Module, tmp_path: Path) -> Session:
    export_float(net, 32, tmp_path / "net.onnx")
    return open_session(tmp_path / "net.onnx", "cpu")


def test_session_says_what_it_is(session: Session) -> None:
    assert (session.provider, session.imgsz, session.output_shape) == ("cpu", 32, (1, 6, 1024))


def test_auto_without_cuda_says_so(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    _say_once.cache_clear()  # a test before may have heard it
    assert open_session(session.path, "auto").provider == "cpu"
    assert "runs on the CPU: no CUDA device" in capsys.readouterr().err


def test_cuda_without_cuda_fails(session: Session) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(QuantrackError, match="provider=cuda: CUDA cannot be used"):
        open_session(session.path, "cuda")


def test_cuda_where_it_is(session: Session) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_gpu = open_session(session.path, "cuda")
    assert on_gpu.provider == "cuda"
    assert "CUDAExecutionProvider" in measure_placement(on_gpu).nodes_by_provider()
    image = np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32)
    np.testing.assert_allclose(on_gpu.run(image), session.run(image), atol=1e-2)
    assert measure_latency(on_gpu, 5).p50 > 0


def test_unknown_provider(session: Session) -> None:
    with pytest.raises(UsageError, match="provider=tpu: unknown provider"):
        open_session(session.path, "tpu")


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_text("nothing")
    with pytest.raises(QuantrackError, match="not a readable ONNX file"):
        open_session(tmp_path / "bad.onnx", "cpu")


def test_latency_percentiles_are_ordered(session: Session) -> None:
    latency = measure_latency(session, 20)
    assert 0 < latency.p50 <= latency.p90 <= latency.p99
    assert latency.runs == 20
    with pytest.raises(UsageError, match="latency_runs=0"):
        measure_latency(session, 0)


def test_two_sessions_are_timed_in_turns(session: Session, tmp_path: Path) -> None:
    torch.manual_seed(0)
    slower = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 6, 3, padding=1), nn.Flatten(2)).eval()
    export_float(slower, 32, tmp_path / "slower.onnx")
    latencies, ratios = measure_in_turns([session, open_session(tmp_path / "slower.onnx", "cpu")], 50)
    assert [latency.runs for latency in latencies] == [50, 50]
    assert ratios[0].median == ratios[0].low == ratios[0].high == 1.0
    assert 1.0 < ratios[1].low <= ratios[1].median <= ratios[1].high
    assert all(latency.low <= latency.p50 <= latency.high for latency in latencies)


def test_tuning_tries_what_can_matter(session: Session) -> None:
    # a float file has no weights to fold
    assert not any(one.fold_weights for one in candidates(session.path, "cpu"))
    trials = tune(session.path, "cpu", 10, session)
    assert [trial.latency.p50 for trial in trials] == sorted(trial.latency.p50 for trial in trials)
    assert {trial.settings.optimization for trial in trials} == {"all", "extended"}
    assert all(trial.ratio is not None and trial.ratio.median > 0 for trial in trials)
    assert all(trial.ratio is None for trial in tune(session.path, "cpu", 10, None))


def test_session_settings_say_what_differs() -> None:
    assert SessionSettings().text == "defaults"
    assert SessionSettings(fold_weights=True, threads=1).text == "fold_weights=true, threads=1"
    with pytest.raises(UsageError, match="optimization=most: unknown level; use one of off, basic, extended, all"):
        SessionSettings(optimization="most")
    with pytest.raises(UsageError, match="threads=-1"):
        SessionSettings(threads=-1)


def test_only_others_count_as_other_load(tmp_path: Path) -> None:
    with watch_other_load() as load:
        sum(range(3_000_000))
    if load.cores is None:
        pytest.skip("this system does not say")
    assert 0 <= load.cores < 64
    assert load.metrics() == {"busy_cores_of_others": load.cores}
    assert not OtherLoad().disturbs
    assert OtherLoad().metrics() == {}
    assert OtherLoad(0.9).disturbs
    assert 10 < peak_memory_mb() < 100_000


def test_placement_counts_every_node(session: Session) -> None:
    placed = measure_placement(session).nodes_by_provider()
    assert set(placed) == {"CPUExecutionProvider"}
    assert sum(placed.values()) >= 1


def test_parity_of_the_same_network(net: nn.Module, session: Session) -> None:
    images = list(np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32))
    parity = measure_parity(torch_network(net), session, images, "one2many")
    assert parity.pictures == 3
    assert parity.max_abs is not None
    assert parity.max_abs < 1e-5
    with torch.no_grad():
        net[0].bias += 0.5
    worse = measure_parity(torch_network(net), session, images, "one2many")
    # boxes (4 of 6 rows) count as a fraction of the 32 pixels, scores as they are
    assert worse.mean_abs == pytest.approx((4 * 0.5 / 32 + 2 * 0.5) / 6, rel=1e-3)


def test_rows_are_matched_by_class_and_box_not_by_order() -> None:
    rows = np.array([[0, 0, 9, 9, 0.9, 1], [50, 50, 60, 60, 0.8, 2], [0, 0, 9, 9, 0.01, 3]], np.float32)
    expected, actual, unmatched = match_rows(rows, rows[[1, 0, 2]])
    assert unmatched == 0
    np.testing.assert_array_equal(expected, actual)
    assert match_rows(rows, rows[:1])[2] == 1
