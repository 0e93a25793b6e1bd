"""Recipes: lists of steps, named or from a user's YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import yaml

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
from quantrack.schemes import Scheme, one_scale_for

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
CALIBRATED: tuple[Step, ...] = (
    InsertQuantizers(),
    ObserveActivations(),
    ChannelEqualization(),
    MseWeightScales(),
    MinMaxActivationRanges(margin=8.0),
)


@dataclass(frozen=True)
class Recipe:
    """A name for tables, and the steps in order."""

    name: str
    steps: tuple[Step, ...]

    def text(self) -> str:
        """The recipe as a file that `read_recipe` reads: every setting of every step."""
        listed = [{step_name(step): {key: _plain(value) for key, value in asdict(step).items()}} for step in self.steps]  # type: ignore[call-overload]
        return yaml.safe_dump({"steps": listed}, sort_keys=False)

    @property
    def plan(self) -> PlanBits | None:
        """Its step that plans bits; None where they go by role."""
        return next((step for step in self.steps if isinstance(step, PlanBits)), None)

    def with_plan(self, plan: PlanBits | None) -> Recipe:
        """The same steps with this one to plan bits, or with none."""
        if plan == self.plan:
            return self
        others = tuple(step for step in self.steps if not isinstance(step, PlanBits))
        return replace(self, steps=others if plan is None else (plan, *others))


def for_packed_weights(recipe: Recipe) -> Recipe:
    """One of our recipes as it serves `weight_storage=int4`, whose layers have 4 or 7 bits throughout.

    With `placement=full` nothing is gained (benchmarks/decisions.md).
    """
    weighing = (replace(step, weigh_all=True) if isinstance(step, PlanBits | Gptq) else step for step in recipe.steps)
    return replace(recipe, steps=tuple(weighing))


LEAST_SHARE_UNEQUALIZED = 0.01  # `ActivationRangeSearch.least_share` in the place of equalized channels

RECIPES: dict[str, tuple[Step, ...]] = {
    # What quantization without care gives: every convolution, DFL's included, by its range.
    "naive": (
        InsertQuantizers(activation="symmetric", roles_at_8_bits=(), float_roles=()),
        ObserveActivations(),
        MinMaxWeightScales(),
        MinMaxActivationRanges(),
    ),
    "fast": (*CALIBRATED, BiasCorrection()),
    "default": (PlanBits(), *CALIBRATED, ActivationRangeSearch(), Gptq(), BiasCorrection()),
    "best": (PlanBits(), *CALIBRATED, ActivationRangeSearch(), Gptq(output_sweeps=2), BiasCorrection()),
}


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which a setting that is given twice is an error; PyYAML keeps the last one in silence."""

    def compose_mapping_node(self, anchor: dict[object, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key[1]} is given twice")
        return node


def parse_recipe(text: str) -> Recipe:
    """A named recipe, or one read from a `*.yaml` file.

    Raises:
        UsageError: there is no recipe of that name, or the file is no recipe.
    """
    if text in RECIPES:
        return Recipe(text, RECIPES[text])
    if text.endswith((".yaml", ".yml")):
        return read_recipe(Path(text))
    raise UsageError(f"recipe={text}: unknown recipe; use one of {', '.join(RECIPES)}, or a *.yaml file")


def read_recipe(path: Path) -> Recipe:
    """A recipe file: `steps:`, a list of step names, each alone or with its settings.

    Raises:
        UsageError: the file is missing or broken, or a step or one of its settings is unknown or refused.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"recipe={path}: cannot be read ({reason}); give a YAML file with `steps:`") from error
    listed = content.get("steps") if isinstance(content, dict) and set(content) == {"steps"} else None
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"recipe={path}: must hold just `steps:` and below it a list of steps")
    steps = tuple(_step(item, path) for item in listed)
    if any(isinstance(step, PlanBits) for step in steps[1:]):
        raise UsageError(
            f"recipe={path}: plan_bits: quantizers need it before them; make it the first step, and the only"
        )
    _require_order(steps, path)
    _require_correction(steps, path)
    return Recipe(path.name if path.stem in RECIPES else path.stem, steps)  # default.yaml is not ours


def _require_order(steps: tuple[Step, ...], path: Path) -> None:
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


def _require_correction(steps: tuple[Step, ...], path: Path) -> None:
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


def recipe_for(variant: Mapping[str, str], recipe: Recipe) -> Recipe:
    """The recipe as the runtime of a variant (`schemes.VARIANTS`) can use it.

    TensorRT takes only activations with zero point 0. Channels are not equalized for kernels that want one scale
    for all channels of an activation; with full placement more ranges are searched then. Integer kernels add weights
    exactly that fit in pairs.
    """
    steps = recipe.steps
    if variant["target"] == "tensorrt":
        steps = tuple(replace(s, activation="symmetric") if isinstance(s, InsertQuantizers) else s for s in steps)
    equalized = any(isinstance(step, ChannelEqualization) for step in steps)
    if one_scale_for(variant):
        steps = tuple(step for step in steps if not isinstance(step, ChannelEqualization))
    if variant["placement"] == "full":
        steps = _with_fitting_pairs(_with_more_ranges_searched(steps) if equalized else steps)
    return recipe if steps == recipe.steps else Recipe(recipe.name, steps)


def _with_more_ranges_searched(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps so that ranges shrink which a few channels make wide: what equalizing them does otherwise."""
    return tuple(
        replace(step, least_share=min(step.least_share, LEAST_SHARE_UNEQUALIZED))
        if isinstance(step, ActivationRangeSearch)
        else step
        for step in steps
    )


def _with_fitting_pairs(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps so that weights fit in pairs: GPTQ sees to it, and a step after all that change weights."""
    kept = tuple(
        replace(step, fit_pairs=True) if isinstance(step, Gptq) else step
        for step in steps
        if not isinstance(step, FitPairSums)
    )
    # behind distillation it comes last, as weights have to fit, and biases are corrected no more
    last = len(kept) - any(isinstance(step, BiasCorrection) for step in kept[-1:])
    return (*kept[:last], FitPairSums(), *kept[last:])


def require_complete(recipe: Recipe, scheme: Scheme) -> None:
    """Check that a recipe leaves every quantizer of a mode with its scale, before any of its steps runs.

    Raises:
        UsageError: a step is missing, or comes after one that works with what it sets.
    """
    steps = recipe.steps
    wanted: list[tuple[tuple[type[Step], ...], str]] = [
        ((InsertQuantizers,), "insert_quantizers"),
        (WEIGHT_SCALES, "one that sets weight scales"),
    ]
    wanted += [(ACTIVATION_RANGES, "one that sets ranges")] if scheme.activation_bits is not None else []
    for kinds, words in wanted:
        place = next((place for place, step in enumerate(steps) if isinstance(step, kinds)), None)
        if place is None:
            raise UsageError(f"recipe={recipe.name}: lacks a step for {scheme.name}: {words}")
        early = [step_name(step) for step in steps[:place] if isinstance(step, RUN_QUANTIZED)]
        if early:
            raise UsageError(f"recipe={recipe.name}: {early[0]}: put {words} before it, for {scheme.name}")


def require_plannable(recipe: Recipe) -> None:
    """Check that a recipe leaves no role float that a plan of bits gives bits to.

    Raises:
        UsageError: it does.
    """
    for step in recipe.steps:
        others = set(step.float_roles) - {Role.DFL} if isinstance(step, InsertQuantizers) else set()
        if others:
            named = ", ".join(sorted(role.value for role in others))
            raise UsageError(f"recipe={recipe.name}: float_roles: a plan of bits leaves only dfl float, not {named}")


def step_name(step: Step) -> str:
    """A step's name in recipe files."""
    return next(name for name, kind in STEPS.items() if kind is type(step))


def _step(item: object, path: Path) -> Step:
    name: object = item
    settings: object = {}
    if isinstance(item, dict) and len(item) == 1:
        name, given = next(iter(item.items()))
        settings = {} if given is None else given
    if not isinstance(name, str) or name not in STEPS:
        raise UsageError(f"recipe={path}: {name}: unknown step; use one of {', '.join(STEPS)}")
    if not isinstance(settings, dict):
        raise UsageError(f"recipe={path}: {name}: its settings must be `name: value`")
    kind = STEPS[name]
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            allowed = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"recipe={path}: {name}: no setting {setting}; {allowed}")
    where = f"recipe={path}: {name}"
    try:
        return kind(**{key: _typed(value, hints[key], f"{where}: {key}") for key, value in settings.items()})
    except UsageError as error:
        message = str(error)
        raise UsageError(
            message if message.startswith(where) else f"{where}: {message.removeprefix(f'{name}: ')}"
        ) from error


def _typed(value: object, kind: object, where: str) -> object:
    """A YAML value as a setting's type: numbers, texts, nothing where a setting may be left out, and lists of roles."""
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
        if value is None:
            return None
    if get_origin(kind) is tuple:
        item_kind = get_args(kind)[0]
        if not isinstance(value, list):
            raise UsageError(f"{where}: must be a list")
        return tuple(_typed(item, item_kind, where) for item in value)
    if kind is Role:
        if value not in [role.value for role in Role]:
            raise UsageError(f"{where}: {value}: unknown role; use {', '.join(role.value for role in Role)}")
        return Role(value)
    if kind is float and type(value) in (int, str):  # YAML 1.1 reads 1e-3 as a text
        with suppress(ValueError):
            value = float(str(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where}: {value}: must be finite")
    if not isinstance(kind, type) or type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, kind)  # type: ignore[call-overload]
        raise UsageError(f"{where}: {value!r}: must be {wanted}")
    return value


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
