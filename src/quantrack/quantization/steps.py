"""The steps that a recipe may name, one file each: what each needs before it, and what would undo it after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantrack.detector.roles import Role
from quantrack.errors import UsageError
from quantrack.quantization.activation_range_search import ActivationRangeSearch
from quantrack.quantization.activation_ranges import (
    MinMaxActivationRanges,
    MseActivationRanges,
    PercentileActivationRanges,
)
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.block_reconstruction import BlockReconstruction
from quantrack.quantization.channel_equalization import ChannelEqualization
from quantrack.quantization.distillation import Distillation
from quantrack.quantization.fit_pair_sums import FitPairSums
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import Step
from quantrack.quantization.observe_activations import ObserveActivations
from quantrack.quantization.plan_bits import PlanBits
from quantrack.quantization.weight_scales import MinMaxWeightScales, MseWeightScales, PercentileWeightScales
from quantrack.schemes import Scheme

# What a recipe file may name.
STEPS: dict[str, type[Step]] = {
    "plan_bits": PlanBits,
    "insert_quantizers": InsertQuantizers,
    "observe_activations": ObserveActivations,
    "channel_equalization": ChannelEqualization,
    "min_max_weight_scales": MinMaxWeightScales,
    "mse_weight_scales": MseWeightScales,
    "percentile_weight_scales": PercentileWeightScales,
    "min_max_activation_ranges": MinMaxActivationRanges,
    "percentile_activation_ranges": PercentileActivationRanges,
    "mse_activation_ranges": MseActivationRanges,
    "activation_range_search": ActivationRangeSearch,
    "gptq": Gptq,
    "block_reconstruction": BlockReconstruction,
    "distillation": Distillation,
    "fit_pair_sums": FitPairSums,
    "bias_correction": BiasCorrection,
}
WEIGHT_SCALES = (MinMaxWeightScales, MseWeightScales, PercentileWeightScales)
ACTIVATION_RANGES = (MinMaxActivationRanges, PercentileActivationRanges, MseActivationRanges)
# Which steps need one of which before them, and what to say of it.
NEEDED: tuple[tuple[tuple[type[Step], ...], tuple[type[Step], ...], str], ...] = (
    ((*ACTIVATION_RANGES, ChannelEqualization), (ObserveActivations,), "observe_activations"),
    (
        (ActivationRangeSearch, Gptq, BlockReconstruction, Distillation, FitPairSums, BiasCorrection),
        WEIGHT_SCALES,
        "a step that sets weight scales, such as mse_weight_scales,",
    ),
    ((ActivationRangeSearch,), ACTIVATION_RANGES, "a step that sets ranges, such as min_max_activation_ranges,"),
)
RUN_QUANTIZED = (ActivationRangeSearch, BlockReconstruction, Distillation, BiasCorrection)  # the quantized network
ROUNDED = (Gptq, BlockReconstruction, Distillation)  # weights, on the grid that they have
AFTER_CORRECTION = (BiasCorrection, Distillation)  # which see to the biases themselves
BEFORE_EQUALIZATION = (PlanBits, InsertQuantizers, ObserveActivations)  # which leave weights and inputs as they are


def step_name(step: Step) -> str:
    """A step's name in recipe files."""
    return next(name for name, kind in STEPS.items() if kind is type(step))


def require_order(steps: tuple[Step, ...], path: Path) -> None:
    """Steps that need others before them have these, and quantizers are inserted once."""
    rest = steps[1:] if steps and isinstance(steps[0], PlanBits) else steps
    inserted = [isinstance(step, InsertQuantizers) for step in rest]
    if rest and (not inserted[0] or sum(inserted) > 1):
        raise UsageError(f"recipe={path}: insert_quantizers: must come first (after plan_bits), and once")
    for place, step in enumerate(rest):
        before = rest[:place]
        for kinds, needed, words in NEEDED:
            if isinstance(step, kinds) and not any(isinstance(one, needed) for one in before):
                raise UsageError(f"recipe={path}: {step_name(step)}: put {words} before it")
        if isinstance(step, ObserveActivations) and any(isinstance(one, ChannelEqualization) for one in before):
            raise UsageError(f"recipe={path}: observe_activations: put it before channel_equalization")
        rounded = [step_name(one) for one in before if isinstance(one, ROUNDED)]
        if isinstance(step, WEIGHT_SCALES) and rounded:
            raise UsageError(f"recipe={path}: {step_name(step)}: put it before {rounded[0]}")
        if isinstance(step, ChannelEqualization) and any(isinstance(one, ChannelEqualization) for one in before):
            raise UsageError(f"recipe={path}: channel_equalization: only once")
        too_early = [step_name(one) for one in before if not isinstance(one, BEFORE_EQUALIZATION)]
        if isinstance(step, ChannelEqualization) and too_early:
            raise UsageError(f"recipe={path}: channel_equalization: put it before {', '.join(too_early)}")


def require_correction(steps: tuple[Step, ...], path: Path) -> None:
    """Biases are corrected after all that changes weights and scales, which would undo it.

    Centred GPTQ leaves layers' mean outputs to that; without it they would stay shifted.
    """
    corrections = [place for place, step in enumerate(steps) if isinstance(step, BiasCorrection)]
    last = corrections[-1] if corrections else len(steps)
    undone = [step_name(step) for step in steps[last:] if not isinstance(step, AFTER_CORRECTION)]
    if undone:
        raise UsageError(f"recipe={path}: bias_correction: put it after {', '.join(undone)}")
    if not corrections and any(isinstance(step, Gptq) and step.centred for step in steps):
        raise UsageError(f"recipe={path}: gptq: add bias_correction after it, or give it `centred: false`")


def require_complete(name: str, steps: Sequence[Step], scheme: Scheme) -> None:
    """Check that a recipe leaves every quantizer of a mode with its scale, before any of its steps runs.

    Raises:
        UsageError: a step is missing, or comes after one that works with what it sets.
    """
    wanted: list[tuple[tuple[type[Step], ...], str]] = [
        ((InsertQuantizers,), "insert_quantizers"),
        (WEIGHT_SCALES, "one that sets weight scales"),
    ]
    wanted += [(ACTIVATION_RANGES, "one that sets ranges")] if scheme.activation_bits is not None else []
    for kinds, words in wanted:
        place = next((place for place, step in enumerate(steps) if isinstance(step, kinds)), None)
        if place is None:
            raise UsageError(f"recipe={name}: lacks a step for {scheme.name}: {words}")
        early = [step_name(step) for step in steps[:place] if isinstance(step, RUN_QUANTIZED)]
        if early:
            raise UsageError(f"recipe={name}: {early[0]}: put {words} before it, for {scheme.name}")


def require_plannable(name: str, steps: Sequence[Step]) -> None:
    """Check that a recipe leaves no role float that a plan of bits gives bits to.

    Raises:
        UsageError: it does.
    """
    for step in steps:
        others = set(step.float_roles) - {Role.DFL} if isinstance(step, InsertQuantizers) else set()
        if others:
            named = ", ".join(sorted(role.value for role in others))
            raise UsageError(f"recipe={name}: float_roles: a plan of bits leaves only dfl float, not {named}")
