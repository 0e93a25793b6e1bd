"""Curvatures of the float network are measured once, for all modes."""

import copy
import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import DEFAULT_BY_ROLE
from torch import nn

from quantrack.cache import cache_folder
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.curvature import Curvature, Sampling, _Positions
from quantrack.quantization.curvature_cache import KEPT, float_curvatures
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import quantized_layers
from quantrack.quantization.step_cache import forget_oldest

MakeJob = Callable[[str], QuantizationJob]
SAMPLING = Gptq(positions=64).sampling


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for each test, so that one finds nothing of another's."""
    monkeypatch.setenv("QUANTRACK_CACHE", str(tmp_path / "cache"))
    return cache_folder() / "curvatures"


def known(make_job: MakeJob, mode: str = "w4a8") -> QuantizationJob:
    """A job of a model that has a digest, with its quantizers inserted."""
    job = replace(make_job(mode), model_digest="tiny")
    InsertQuantizers().apply(job)
    return job


def passes(job: QuantizationJob, sampling: Sampling = SAMPLING) -> tuple[dict[str, Curvature], int]:
    """The float network's curvatures, and how often its first convolution ran for them."""
    count = 0

    def seen(*_: object) -> None:
        nonlocal count
        count += 1

    handle = job.float_model.get_submodule("model.0").register_forward_hook(seen)
    try:
        found: dict[str, Curvature] = {}
        for by_name in float_curvatures(job, sampling):
            found |= by_name
        return found, count
    finally:
        handle.remove()


def equal(one: Mapping[str, Curvature], other: Mapping[str, Curvature]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].centred, other[name].centred) and torch.equal(one[name].mean, other[name].mean)
        for name in one
    )


def test_another_mode_finds_them_kept(make_job: MakeJob) -> None:
    first, runs = passes(known(make_job, "w4a8"))
    assert runs > 0
    for mode in ("w8a16", "w4a8"):
        job = known(make_job, mode)
        again, runs = passes(job)
        assert runs == 0
        assert equal(first, again)
        assert job.cached_time.seconds > 0  # what the first one took
        seconds = job.cached_time.seconds
        passes(job)
        assert job.cached_time.seconds == seconds  # counted once


def test_what_they_depend_on_makes_them_anew(make_job: MakeJob) -> None:
    job = known(make_job)
    passes(job)
    few = replace(job, calibration=job.calibration.first(2))
    for other in (replace(job, seed=1), replace(job, model_digest="other"), replace(job, head="one2many"), few):
        assert passes(other)[1] > 0
    for other in (replace(job, imgsz=64), replace(job, batch=2)):
        assert passes(other)[1] > 0
    others = ({"positions": 32}, {"mirrored": True}, {"weigh_all": True})
    for sampling in (replace(SAMPLING, **other) for other in others):
        assert passes(job, sampling)[1] > 0
    fewer = replace(job, model=copy.deepcopy(job.model))
    fewer.model.model[1] = copy.deepcopy(fewer.float_model.model[1])
    assert len(passes(fewer)[0]) == len(passes(job)[0]) - 1
    assert passes(job)[1] == 0


def test_a_model_without_a_digest_keeps_none(make_job: MakeJob, cache: Path) -> None:
    job = replace(known(make_job), model_digest="")
    assert passes(job)[1] == passes(job)[1] > 0
    assert not cache.exists()


def test_what_is_cut_short_is_not_kept(make_job: MakeJob, cache: Path) -> None:
    walk = float_curvatures(known(make_job), SAMPLING)
    next(iter(walk))
    del walk
    assert list(cache.iterdir()) == []
    assert passes(known(make_job))[1] > 0


@pytest.mark.parametrize("fails_at", ["the folder", "a file", "the last file"])
def test_a_cache_that_cannot_be_written_changes_nothing(
    make_job: MakeJob, cache: Path, fails_at: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = passes(replace(known(make_job), model_digest=""))
    if fails_at == "the folder":
        cache.parent.touch()  # where a folder is wanted
    elif fails_at == "a file":
        monkeypatch.setattr(torch, "save", full_after(0))
    else:
        monkeypatch.setattr("quantrack.quantization.curvature_cache.write_json", no_room)
    for _ in range(2):
        again, runs = passes(known(make_job))
        assert runs > 0
        assert equal(first, again)
    assert "cannot be written" in capsys.readouterr().err
    assert not cache.is_dir() or list(cache.iterdir()) == []


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after(files: int) -> Callable[..., None]:
    """`torch.save` on a disk that has room for so many files."""
    save, count = torch.save, 0

    def saves(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > files:
            raise RuntimeError("[enforce fail at inline_container.cc:815] . unexpected pos 128 vs 22")
        save(*arguments)

    return saves


def test_steps_go_on_without_a_cache(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantrack.quantization.apply.WORTH_SECONDS", 0.0)
    plain, without = make_job("w4a8"), replace(make_job("w4a8"), model_digest="tiny")
    apply_recipe(plain, DEFAULT_BY_ROLE)
    monkeypatch.setenv("QUANTRACK_CACHE", "/dev/null/nowhere")
    apply_recipe(without, DEFAULT_BY_ROLE)
    for one, other in zip(*(quantized_layers(job.model).values() for job in (plain, without)), strict=True):
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("damaged", [KEPT, "1.pt"])
def test_a_broken_file_is_measured_again(make_job: MakeJob, cache: Path, damaged: str) -> None:
    first, _ = passes(known(make_job))
    (folder,) = cache.iterdir()
    (folder / damaged).write_bytes((folder / damaged).read_bytes()[:20])
    again, runs = passes(known(make_job))
    assert runs > 0
    assert equal(first, again)
    assert passes(known(make_job))[1] == 0


def test_kept_curvatures_give_the_same_weights(make_job: MakeJob) -> None:
    plain, keeping, finding = (replace(make_job("w4a8"), model_digest=digest) for digest in ("", "tiny", "tiny"))
    for job in (plain, keeping, finding):
        apply_recipe(job, DEFAULT_BY_ROLE)
    weights = [[layer.weight for layer in quantized_layers(job.model).values()] for job in (plain, keeping, finding)]
    for others in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(weights[0], others, strict=True))


def took(cache: Path, seconds: float) -> None:
    """As if the walk had taken so long."""
    (folder,) = cache.iterdir()
    kept = json.loads((folder / KEPT).read_text())
    (folder / KEPT).write_text(json.dumps(kept | {"seconds": seconds}))


def test_a_step_counts_the_time_that_was_kept(make_job: MakeJob, cache: Path) -> None:
    passes(known(make_job), Gptq().sampling)
    took(cache, 1000.0)
    reports = apply_recipe(replace(make_job("w4a8"), model_digest="tiny"), DEFAULT_BY_ROLE)
    assert [report.seconds > 1000 for report in reports] == [report.step == "Gptq" for report in reports]


def test_a_constant_input_is_rounded_to_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(2, 3, 1, generator=generator) * 100 + torch.zeros(2, 3, 64)
    columns[1] += torch.randn(3, 64, generator=generator)
    mean = columns.mean(dim=2)
    curvature = Curvature(columns @ columns.transpose(1, 2) / 64, mean, mean, None)
    assert not curvature.centred[0].any()
    torch.testing.assert_close(curvature.centred[1], torch.cov(columns[1], correction=0), rtol=0.01, atol=0.01)
    weight, scale = torch.randn(2, 4, 3, generator=generator), torch.full((2, 4), 0.25)
    rounded, _ = Gptq(scale_factors=(1.0,), sweeps=0, unshrunken=False).rounded(weight, scale, 4, curvature.centred)
    torch.testing.assert_close(rounded[0], torch.round(weight[0] / 0.25).clamp(-8, 7) * 0.25)
    assert rounded.isfinite().all()


def test_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantrack.quantization.step_cache.LIMIT_BYTES", 30_000)
    for name in ("old", "newer", "newest"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.pt").write_bytes(bytes(9_000))
    (tmp_path / "file.pt").write_bytes(bytes(9_000))
    for name, hours in ((".being-written.tmp", 1), (".left.tmp", 30)):
        (tmp_path / name).write_bytes(bytes(9_000))
        os.utime(tmp_path / name, (time.time() - hours * 3600,) * 2)
    forget_oldest(tmp_path, keep=tmp_path / "newest")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".being-written.tmp", "file.pt", "newer", "newest"]


def test_each_picture_counts_alike_whatever_batch_it_is_in(make_job: MakeJob) -> None:
    everywhere = Sampling(
        positions=10**6, importance_share=0.0, weigh_all=False, mirrored=False, covariances=False, memory_gb=1.0
    )
    one, others = (passes(replace(known(make_job), batch=batch), everywhere)[0] for batch in (4, 3))
    for name, curvature in one.items():
        torch.testing.assert_close(curvature.mean, others[name].mean)
        torch.testing.assert_close(curvature.drawn_mean, curvature.mean)
        torch.testing.assert_close(curvature.inputs, others[name].inputs)


def test_what_comes_after_the_raw_outputs_is_looked_at_evenly(make_job: MakeJob) -> None:
    positions = _Positions(SAMPLING, known(make_job))
    positions.importance = [{}]  # of DFL, which decodes boxes, there is none
    x = torch.arange(1000.0).reshape(1, 1, 10, 100)
    columns, weights = positions.of("model.23.dfl.conv", 0, x, nn.Conv2d(1, 1, 1))
    assert columns.shape == (1, 1, 64)
    assert weights is None
    assert 300 < columns.mean() < 700


def test_where_all_positions_are_taken_they_can_count_by_importance_too(make_job: MakeJob) -> None:
    """As often as they would be drawn, but for chance."""
    positions = _Positions(replace(SAMPLING, positions=16, importance_share=0.75, weigh_all=True), known(make_job))
    positions.importance = [{"layer": torch.zeros(1, 4, 4)}]
    positions.importance[0]["layer"][0, 1, 2] = 3.0
    x, layer = torch.arange(16.0).reshape(1, 1, 4, 4), nn.Conv2d(1, 1, 1)
    columns, weights = positions.of("layer", 0, x, layer)
    assert weights is not None
    assert (columns * weights).mean() == pytest.approx(0.75 * 6 + 0.25 * 7.5)
    alike = _Positions(replace(positions.sampling, weigh_all=False), known(make_job))
    alike.importance = positions.importance
    assert alike.of("layer", 0, x, layer)[1] is None
    few = _Positions(replace(positions.sampling, positions=15), known(make_job))
    few.importance = positions.importance
    drawn = torch.cat([few.of("layer", 0, x, layer)[0].flatten() for _ in range(400)])
    assert (drawn == 6).float().mean() == pytest.approx(float(weights[6]) / 16, abs=0.02)
