"""A quantized model's state, read again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes import DEFAULT_BY_ROLE

from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.recipe import RECIPES
from quantrack.quantization.state import load_weights, read_quantized, save_quantized

MakeJob = Callable[[str], QuantizationJob]


def test_loading_keeps_the_quantizers_where_they_are(make_job: MakeJob) -> None:
    """Made anew they would lie on the CPU, beside a model on a GPU, and want gradients."""
    first, other = make_job("w4a8"), make_job("w4a8")
    apply_recipe(first, DEFAULT_BY_ROLE)
    apply_recipe(other, RECIPES["fast"])
    before = dict(other.model.named_parameters())
    load_weights(other.model, first.model.state_dict())
    after = dict(other.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    batch = next(first.batches())
    assert torch.equal(other.model(batch), first.model(batch))


def test_a_state_read_for_a_model_on_a_gpu_lies_there(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr("quantrack.quantization.apply.WORTH_SECONDS", 0.0)
    gpu = torch.device("cuda")
    jobs = [make_job("w4a8"), make_job("w4a8")]
    jobs = [replace(job, model=job.model.to(gpu), float_model=job.float_model.to(gpu), device=gpu) for job in jobs]
    for job in jobs:
        reports = apply_recipe(job, DEFAULT_BY_ROLE)
    assert all(report.cached for report in reports)
    save_quantized(tmp_path / "state.pt", jobs[1].model)
    read = read_quantized(tmp_path / "state.pt", jobs[1].float_model)
    batch = next(jobs[0].batches())
    for model in (jobs[1].model, read):
        assert {value.device.type for value in model.state_dict().values()} == {"cuda"}
        torch.testing.assert_close(model(batch), jobs[0].model(batch))
