"""Named recipes: which steps run, in which order."""

from __future__ import annotations

import time

from quantrack.errors import UsageError
from quantrack.progress import say
from quantrack.quantization.activation_ranges import MinMaxActivationRanges
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert import InsertQuantizers
from quantrack.quantization.job import QuantizationJob, Step, StepReport
from quantrack.quantization.observe import ObserveActivations
from quantrack.quantization.weight_scales import MinMaxWeightScales, MseWeightScales

RECIPES: dict[str, tuple[Step, ...]] = {
    # What quantization without care gives: every convolution, DFL's included, by its range.
    "naive": (
        InsertQuantizers(activation="symmetric", roles_at_8_bits=(), float_roles=()),
        ObserveActivations(),
        MinMaxWeightScales(),
        MinMaxActivationRanges(),
    ),
    "default": (
        InsertQuantizers(),
        ObserveActivations(),
        MseWeightScales(),
        MinMaxActivationRanges(),
        Gptq(),
        BiasCorrection(),
    ),
}


def parse_recipe(name: str) -> tuple[Step, ...]:
    """The steps of a named recipe.

    Raises:
        UsageError: there is no recipe of that name.
    """
    if name not in RECIPES:
        raise UsageError(f"recipe={name}: unknown recipe; use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def apply_recipe(job: QuantizationJob, steps: tuple[Step, ...]) -> tuple[StepReport, ...]:
    """Run the steps in order on the job's model and report each."""
    reports = []
    for step in steps:
        start = time.perf_counter()
        figures = step.apply(job)
        report = StepReport(type(step).__name__, time.perf_counter() - start, figures)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        say(f"{report.step}: {report.seconds:.1f} s{', ' + shown if shown else ''}")
        reports.append(report)
    return tuple(reports)
