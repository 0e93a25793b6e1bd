"""Run a recipe: each step in order, timed, its effect measured, its result kept for the next time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantrack.detector.heads import RawOutputs, head_levels, raw_outputs
from quantrack.errors import QuantrackError
from quantrack.progress import say
from quantrack.quantization.divergence import detection_divergence
from quantrack.quantization.job import QuantizationJob, Step, StepReport, first_pictures
from quantrack.quantization.layers import NOTHING_QUANTIZED, quantized_layers, scales_are_set
from quantrack.quantization.step_cache import WORTH_SECONDS, restore_step, save_step, step_keys

PROBE_PICTURES = 8


def apply_recipe(
    job: QuantizationJob, steps: Sequence[Step], on_step: Callable[[int, StepReport], None] = lambda place, report: None
) -> tuple[StepReport, ...]:
    """Run the steps in order on the job's model and report each; steps found in the cache are not run.

    A report's figures hold, beside the step's own, `divergence_before` and `divergence_after`: how far
    the raw outputs are from the float model's on a few calibration pictures. `on_step` is told each
    report, with its place from 1, as soon as it is there.
    """
    keys = step_keys(job, steps)
    reports = _restored(job, keys)
    start = len(reports)
    for place, report in enumerate(reports, 1):
        on_step(place, report)
    probe = float_probe(job) if start < len(steps) else None
    before = output_divergence(job, probe)
    for step, key in zip(steps[start:], keys[start:], strict=True):
        began, kept = time.perf_counter(), job.cached_time.seconds
        figures = step.apply(job)
        seconds = time.perf_counter() - began + job.cached_time.seconds - kept
        after = output_divergence(job, probe)
        apart = {"divergence_before": before, "divergence_after": after}
        known = {name: value for name, value in apart.items() if value is not None}
        reports.append(StepReport(type(step).__name__, seconds, {**figures, **known}))
        say(_line(reports[-1]))
        if seconds >= WORTH_SECONDS:  # before others hear of it, who may fail
            save_step(key, job, reports)
        on_step(len(reports), reports[-1])
        before = after
    return tuple(reports)


def require_quantized(model: nn.Module) -> None:
    """Check what steps have left: a network without quantizers, or with unset ones, measures nothing.

    Raises:
        QuantrackError: no convolution is quantized, or a scale is not set.
    """
    if not quantized_layers(model):
        raise QuantrackError(NOTHING_QUANTIZED)
    if not scales_are_set(model):
        raise QuantrackError(
            "recipe: not every quantizer has a scale; add steps such as mse_weight_scales and, for INT8 activations, "
            "min_max_activation_ranges"
        )


@dataclass(frozen=True)
class Probe:
    """A few calibration pictures [B, 3, S, S], and the float model's raw outputs for them."""

    pictures: Tensor
    outputs: RawOutputs


@torch.no_grad()
def float_probe(job: QuantizationJob) -> Probe | None:
    """What quantized models are to be held against; None without a known head."""
    if not head_levels(job.float_model):
        return None
    pictures = next(replace(first_pictures(job, PROBE_PICTURES), batch=PROBE_PICTURES).batches())
    with raw_outputs(job.float_model) as tap:
        job.float_model(pictures)
        return Probe(pictures, tap.taken())


@torch.no_grad()
def output_divergence(job: QuantizationJob, probe: Probe | None) -> float | None:
    """Score and box divergence per object; None until all scales are set, or without a probe."""
    if probe is None or not scales_are_set(job.model):
        return None
    with raw_outputs(job.model) as tap:
        job.model(probe.pictures)
        return float(detection_divergence(tap.taken(), probe.outputs).outputs)


def _restored(job: QuantizationJob, keys: Sequence[str]) -> list[StepReport]:
    """Put the job into the state after the latest step in the cache; the reports up to it."""
    for done in range(len(keys), 0, -1):
        reports = restore_step(keys[done - 1], job)
        if reports is not None:
            for report in reports:
                say(f"{_line(report)} (from the cache)")
            return [replace(report, cached=True) for report in reports]
    return []


def _line(report: StepReport) -> str:
    shown = ", ".join(f"{key} {value:.4g}" for key, value in report.figures.items())
    return f"{report.step}: {report.seconds:.1f} s{', ' + shown if shown else ''}"
