from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from quantrack.errors import QuantrackError, UsageError
from quantrack.onnx.export import export_float
from quantrack.onnx.inspect import sums_can_saturate
from quantrack.runtime.exact_sums import sums_are_exact
from quantrack.runtime.latency import _bind, measure_in_turns
from quantrack.runtime.machine_load import OtherLoad, peak_memory_mb, watch_other_load
from quantrack.runtime.parity import (
    match_rows,
    measure_parity,
    one2many_differences,
    one2one_differences,
    torch_network,
)
from quantrack.runtime.placement import measure_placement
from quantrack.runtime.session import (
    REFERENCE,
    Session,
    SessionSettings,
    _say_once,
    open_given,
    open_session,
    settings_for,
    usable_cores,
)
from quantrack.runtime.tune import candidates, tune


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(2)).eval()


@pytest.fixture
def session(net: nn.Module, tmp_path: Path) -> Session:
    export_float(net, 32, tmp_path / "net.onnx")
    return open_session(tmp_path / "net.onnx", "cpu")


@pytest.fixture
def integer_convolution(tmp_path: Path) -> Path:
    """A convolution of the largest weights between quantizers: pairs of its products do not fit 16 bits."""
    return save_convolution(tmp_path / "integers.onnx", np.full((4, 3, 3, 3), 127, np.int8))


def save_convolution(path: Path, weights: NDArray[np.int8], groups: int = 1) -> Path:
    """A 3x3 convolution of 8x8 pixels between quantizers, 200 the largest of its results."""
    values = {
        "one": np.float32(1 / 255), "zero": np.uint8(0), "int8 zero": np.int8(0),
        "w": weights, "large": np.float32(127 * weights[0].size / 200),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "one", "zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "one", "int8 zero"], ["wf"]),
        helper.make_node("Conv", ["xf", "wf"], ["c"], pads=[1, 1, 1, 1], group=groups),
        helper.make_node("QuantizeLinear", ["c", "large", "zero"], ["c8"]),
        helper.make_node("DequantizeLinear", ["c8", "large", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weights.shape[1] * groups, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, len(weights), 8, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


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
    assert measure_in_turns([on_gpu], 5)[0][0].p50 > 0


def test_unknown_provider(session: Session) -> None:
    with pytest.raises(UsageError, match="provider=tpu: unknown provider"):
        open_session(session.path, "tpu")


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_text("nothing")
    with pytest.raises(QuantrackError, match="not a readable ONNX file"):
        open_session(tmp_path / "bad.onnx", "cpu")


def test_a_model_whose_weights_lie_in_another_file_that_is_gone(session: Session, tmp_path: Path) -> None:
    onnx.save(
        onnx.load(session.path), tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin",
        size_threshold=0,
    )  # fmt: skip
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(QuantrackError, match=r"model.onnx: not a readable ONNX file \(.*weights.bin"):
        open_session(tmp_path / "model.onnx", "cpu")


@pytest.mark.parametrize(
    "inputs",
    [
        {"images": (TensorProto.FLOAT, ["N", 3, "H", "W"])},
        {"images": (TensorProto.FLOAT, [1, 3, 32, 64])},
        {"images": (TensorProto.UINT8, [1, 3, 32, 32])},
        {"features": (TensorProto.FLOAT, [1, 1000])},
        {"images": (TensorProto.FLOAT, [1, 3, 32, 32]), "sizes": (TensorProto.FLOAT, [1, 2])},
    ],
)
def test_a_file_of_others_is_refused(inputs: dict[str, tuple[int, list[int | str]]], tmp_path: Path) -> None:
    nodes = [helper.make_node("Shape", [name], [f"shape of {name}"]) for name in inputs]
    shapes = {name: len(shape) for name, (_, shape) in inputs.items()}
    graph = helper.make_graph(
        nodes, "foreign",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(f"shape of {name}", TensorProto.INT64, [rank]) for name, rank in shapes.items()],
    )  # fmt: skip
    path = tmp_path / "foreign.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    with pytest.raises(QuantrackError, match=r"foreign.onnx: takes .*; Quantrack runs files of one float32 input"):
        open_given(path, "cpu")


def test_latency_percentiles_are_ordered(session: Session) -> None:
    (latency,), _ = measure_in_turns([session], 20)
    assert 0 < latency.p50 <= latency.p90 <= latency.p99
    assert latency.runs == 20
    with pytest.raises(UsageError, match="latency_runs=0"):
        measure_in_turns([session], 0)


def test_few_runs_have_an_interval_of_short_turns_or_none(session: Session) -> None:
    (few,), (ratio,) = measure_in_turns([session], 5)
    assert few.low < few.high
    assert {"latency_ms_p50_ci_low", "latency_ms_p50_ci_high"} < few.metrics().keys()
    (fewer,), (ratio,) = measure_in_turns([session], 4)
    assert {name for name in fewer.metrics() | ratio.metrics() if "ci" in name} == set()


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


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        (
            "cuda",
            {
                "defaults", "fold_weights=true", "tf32=false", "fold_weights=true, tf32=false", "cuda_graph=true",
                "fold_weights=true, cuda_graph=true", "io_binding=false",
            },
        ),
        ("tensorrt", {"defaults", "fp16=true", "io_binding=false"}),
    ],
)  # fmt: skip
def test_a_gpu_has_choices_of_its_own(
    monkeypatch: pytest.MonkeyPatch, integer_convolution: Path, provider: str, expected: set[str]
) -> None:
    """What is tried without a GPU here: the list; TensorRT needs weights' Q/DQ, so they are never folded there."""
    monkeypatch.setattr("quantrack.runtime.tune.resolve_provider", lambda _: provider)
    monkeypatch.setattr("quantrack.runtime.session.sums_are_exact", lambda: True)
    found = [one.text for one in candidates(integer_convolution, provider)]
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_file_for_tensorrt_is_opened_as_it_is(monkeypatch: pytest.MonkeyPatch, integer_convolution: Path) -> None:
    monkeypatch.setattr("quantrack.runtime.session.sums_are_exact", lambda: False)
    assert settings_for(integer_convolution, "tensorrt") == SessionSettings()
    assert settings_for(integer_convolution, "cpu") == SessionSettings(exact_sums=True)
    asked: list[object] = []
    monkeypatch.setattr("quantrack.runtime.session.resolve_provider", lambda _: "tensorrt")
    monkeypatch.setattr(
        "quantrack.runtime.session.ort.InferenceSession",
        lambda *_, providers, **__: asked.append(providers[0]) or _Loaded(),
    )
    opened = open_session(integer_convolution, "tensorrt")
    assert (opened.provider, opened.settings) == ("tensorrt", SessionSettings())
    open_session(integer_convolution, "tensorrt", SessionSettings(fp16=True))
    provider = "TensorrtExecutionProvider"
    integers = {"trt_int8_enable": "1"}  # without it TensorRT refuses Q/DQ
    assert asked == [
        (provider, {"trt_fp16_enable": "0", **integers}), (provider, {"trt_fp16_enable": "1", **integers})
    ]  # fmt: skip


class _Loaded:
    def get_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_run_that_copies_binds_nothing_and_is_never_the_best(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying = open_session(session.path, "cpu", SessionSettings(io_binding=False))
    assert copying.settings.text == "io_binding=false"
    bound: list[Session] = []
    monkeypatch.setattr("quantrack.runtime.latency._bind", lambda one, images: bound.append(one) or _bind(one, images))
    latencies, ratios = measure_in_turns([session, copying], 20)
    assert bound == [session]
    assert [latency.runs for latency in latencies] == [20, 20]
    assert ratios[1].median > 0
    settings = (SessionSettings(io_binding=False), SessionSettings(), SessionSettings(threads=1))
    monkeypatch.setattr("quantrack.runtime.tune.candidates", lambda *_: settings)
    assert not tune(session.path, "cpu", 10, None)[-1].settings.io_binding


def test_session_settings_say_what_differs() -> None:
    assert SessionSettings().text == "defaults"
    assert SessionSettings(fold_weights=True, threads=1).text == "fold_weights=true, threads=1"
    with pytest.raises(UsageError, match="optimization=most: unknown level; use one of off, basic, extended, all"):
        SessionSettings(optimization="most")
    with pytest.raises(UsageError, match="threads=-1"):
        SessionSettings(threads=-1)


def test_exact_sums_are_asked_for_where_they_are_not_given(
    monkeypatch: pytest.MonkeyPatch, integer_convolution: Path
) -> None:
    image = np.ones((1, 3, 8, 8), np.float32)
    right = open_session(integer_convolution, "cpu", REFERENCE).run(image)
    usual = open_session(integer_convolution, "cpu", SessionSettings()).run(image)
    assert sums_are_exact() == np.array_equal(usual, right)  # true with VNNI, false with AVX2 alone
    np.testing.assert_array_equal(open_session(integer_convolution, "cpu").run(image), right)
    for exact in (True, False):
        monkeypatch.setattr("quantrack.runtime.session.sums_are_exact", lambda exact=exact: exact)
        session = open_session(integer_convolution, "cpu")
        assert session.settings == SessionSettings(exact_sums=not exact)
        assert {one.exact_sums for one in candidates(session.path, "cpu") if not one.fold_weights} == {not exact}
    np.testing.assert_array_equal(session.run(image), right)
    # a file of which only a few convolutions compute on integers is opened with folded weights, and tuned without
    monkeypatch.setattr("quantrack.runtime.session.has_integer_convolutions", lambda path: False)
    assert settings_for(integer_convolution, "cpu") == SessionSettings(fold_weights=True)
    assert {one.exact_sums for one in candidates(session.path, "cpu") if not one.fold_weights} == {True}


def test_padding_with_zeros_stays_zeros_before_max_pool(tmp_path: Path) -> None:
    """As YOLOv3-tiny pads; ONNX Runtime's own fusion pads with minus infinity."""
    value, node = helper.make_tensor_value_info, helper.make_node
    graph = helper.make_graph(
        [
            node("Pad", ["images", "pads"], ["padded"]),
            node("MaxPool", ["padded"], ["pooled"], kernel_shape=[2, 2], strides=[1, 1]),
        ],
        "g", [value("images", 1, [1, 3, 2, 2])], [value("pooled", 1, [1, 3, 2, 2])],
        [numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 1, 1]), "pads")],
    )  # fmt: skip
    path = tmp_path / "pad.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    given = np.full((1, 3, 2, 2), -1, np.float32)
    assert open_session(path, "cpu").run(given)[0, 0].tolist() == [[-1, 0], [0, 0]]


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (16, 1), (16, 2), (6, 2)])
def test_exact_sums_are_not_asked_for_where_weights_fit_in_pairs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, channels: int, groups: int
) -> None:
    """Weights of the largest sum that fits, in the order of ONNX Runtime's kernels: the usual ones add them right."""
    size = channels // groups
    in_order = np.full((8, 9 * size), 1, np.int8)
    in_order[:, 0::2] = 127
    path = save_convolution(tmp_path / "fitting.onnx", np.moveaxis(in_order.reshape(8, 3, 3, size), -1, 1), groups)
    assert not sums_can_saturate(path)
    monkeypatch.setattr("quantrack.runtime.session.sums_are_exact", lambda: False)
    usual = open_session(path, "cpu")
    assert usual.settings == SessionSettings()
    image = np.ones((1, channels, 8, 8), np.float32)
    np.testing.assert_array_equal(usual.run(image), open_session(path, "cpu", REFERENCE).run(image))
    in_order[0, 1] = 2
    save_convolution(path, np.moveaxis(in_order.reshape(8, 3, 3, size), -1, 1), groups)
    assert sums_can_saturate(path)


@pytest.mark.parametrize(("largest", "may"), [(3, False), (127, True)])
@pytest.mark.parametrize("way", ["Identity", "Constant"])
def test_weights_are_known_however_the_file_holds_them(
    integer_convolution: Path, way: str, largest: int, may: bool
) -> None:
    model = onnx.load(integer_convolution)
    kept = [item for item in model.graph.initializer if item.name != "w"]
    weights = numpy_helper.from_array(np.full((4, 3, 3, 3), largest, np.int8), "stored")
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *([weights] if way == "Identity" else [])])
    inputs, attributes = (["stored"], {}) if way == "Identity" else ([], {"value": weights})
    model.graph.node.insert(0, helper.make_node(way, inputs, ["w"], **attributes))
    onnx.save(model, integer_convolution)
    assert sums_can_saturate(integer_convolution) == may


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("", 8)]
)
def test_cores_of_a_container(text: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr("quantrack.runtime.session.CPU_SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == cores


def test_weights_of_unknown_size_may_saturate(integer_convolution: Path) -> None:
    """Float ones that the file itself quantizes."""
    model = onnx.load(integer_convolution)
    kept = [item for item in model.graph.initializer if item.name != "w"]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "float w")])
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["float w", "one", "int8 zero"], ["w"]))
    onnx.save(model, integer_convolution)
    assert sums_can_saturate(integer_convolution)


def test_only_others_count_as_other_load(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, busy, own = iter((100.0, 110.0)), iter((50.0, 68.0)), iter((3.0, 13.0))
    times = SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: next(own))
    monkeypatch.setattr("quantrack.runtime.machine_load.time", times)
    monkeypatch.setattr("quantrack.runtime.machine_load._busy_seconds", lambda: next(busy))
    with watch_other_load() as load:
        pass
    assert load.cores == pytest.approx(0.8)  # 18 s of work within 10 s, of which 10 were ours
    assert load.disturbs
    assert load.metrics() == {"busy_cores_of_others": load.cores}


def test_this_machine_says_how_busy_it_is() -> None:
    with watch_other_load() as load:
        sum(range(3_000_000))
    if load.cores is None:
        pytest.skip("this system does not say")
    assert 0 <= load.cores < 64
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
        net[0].bias += 5  # so that all positions are detections
    worse = measure_parity(torch_network(net), session, images, "one2many")
    # boxes (4 of 6 rows) count as a fraction of the 32 pixels, scores as they are
    assert worse.mean_abs == pytest.approx((4 * 5 / 32 + 2 * 5) / 6, rel=1e-3)


def test_rows_are_matched_by_class_and_box_not_by_order() -> None:
    rows = np.array([[0, 0, 9, 9, 0.9, 1], [50, 50, 60, 60, 0.8, 2], [0, 0, 9, 9, 0.01, 3]], np.float32)
    expected, actual, alone = match_rows(rows, rows[[1, 0, 2]])
    assert len(alone) == 0
    np.testing.assert_array_equal(expected, actual)
    assert match_rows(rows, rows[:1])[2].tolist() == [pytest.approx(0.8)]


def test_detections_of_either_side_count() -> None:
    rows = np.array([[0, 0, 9, 9, 0.9, 1], [50, 50, 60, 60, 0.8, 2], [0, 0, 9, 9, 0.01, 3]], np.float32)
    invented = rows.copy()
    invented[2] = 20, 20, 30, 30, 0.7, 4
    assert match_rows(rows, invented)[2].tolist() == [pytest.approx(0.7)]
    differences, unmatched = one2one_differences(rows, invented, 64)
    assert (differences.max(), unmatched) == (pytest.approx(0.7), 1)  # and so in what `promote` goes by
    invented[2, 5] = 3  # a class that the other side has, unseen and elsewhere: a pair that is far apart
    left, right, alone = match_rows(rows, invented)
    assert len(alone) == 0
    np.testing.assert_allclose(np.abs(left - right).max(axis=0), [20, 20, 21, 21, 0.69], atol=1e-6)


def test_one_to_many_parity_is_of_detections_not_of_background() -> None:
    """With every score at zero nothing is detected, and nearly all of the output is the same."""
    output = np.zeros((4 + 3, 1000), np.float32)
    output[:4] = 16
    output[5, 7] = 0.8
    silent = output.copy()
    silent[4:] = 0
    differences, alone = one2many_differences(output, silent, 32)
    assert alone == 0
    assert differences.max() == pytest.approx(0.8)
    assert differences.mean() == pytest.approx(0.8 / 5)  # of four sides of a box and a score
    assert one2many_differences(silent, output, 32)[0].mean() == pytest.approx(0.8 / 5)
    assert one2many_differences(silent, silent, 32)[0].size == 0
