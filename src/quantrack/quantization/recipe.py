"""Recipes: lists of steps, named or from a user's YAML file."""

from __future__ import annotations

import math
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
from quantrack.quantization.activation_ranges import MinMaxActivationRanges
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.channel_equalization import ChannelEqualization
from quantrack.quantization.fit_pair_sums import FitPairSums
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import Step
from quantrack.quantization.observe_activations import ObserveActivations
from quantrack.quantization.plan_bits import PlanBits
from quantrack.quantization.steps import STEPS, require_correction, require_order, step_name
from quantrack.quantization.weight_scales import MinMaxWeightScales, MseWeightScales
from quantrack.schemes import Variant

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
    require_order(steps, path)
    require_correction(steps, path)
    return Recipe(path.name if path.stem in RECIPES else path.stem, steps)  # default.yaml is not ours


def recipe_for(variant: Variant, recipe: Recipe) -> Recipe:
    """The recipe as the runtime of a variant can use it.

    TensorRT takes only activations with zero point 0. Channels are not equalized for kernels that want one scale
    for all channels of an activation; with full placement more ranges are searched then. Integer kernels add weights
    exactly that fit in pairs.
    """
    steps = recipe.steps
    if variant.target == "tensorrt":
        steps = tuple(replace(s, activation="symmetric") if isinstance(s, InsertQuantizers) else s for s in steps)
    equalized = any(isinstance(step, ChannelEqualization) for step in steps)
    if variant.one_scale_for:
        steps = tuple(step for step in steps if not isinstance(step, ChannelEqualization))
    if variant.placement == "full":
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
