"""Recipes of tests that look at what steps do, and not at how well."""

from dataclasses import replace

from quantrack.quantization.gptq import Gptq
from quantrack.quantization.job import Step
from quantrack.quantization.recipe import parse_recipe

DEFAULT_BY_ROLE = parse_recipe("default").with_plan(None).steps  # without a detection head nothing says what bits cost


def with_fewer_trials(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The same steps, of which GPTQ tries less: the same code runs, less often."""
    return tuple(
        replace(step, scale_factors=(0.9, 1.0), sweeps=1) if isinstance(step, Gptq) else step for step in steps
    )
