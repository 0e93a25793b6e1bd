"""How much each convolution alone costs, quantized to few bits in a network that is float otherwise.

The table that a bit plan is made of. Weights are rounded as a recipe would round them (MSE scales,
then GPTQ). What that does to the logits and boxes of the float network's objects is estimated for each layer
from gradients over all calibration pictures, or measured: each layer is put alone into the float network,
and the raw outputs, or a score, are compared with the float ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantrack.detector.roles import Role, convolution_roles
from quantrack.errors import UsageError
from quantrack.progress import track
from quantrack.quantization.bit_plan import OFFERED_BITS, BitPlan, LayerBits, LayerCost, require_choice, solve_bits
from quantrack.quantization.curvature import Curvature
from quantrack.quantization.curvature_cache import float_curvatures
from quantrack.quantization.gptq import Gptq, grouped
from quantrack.quantization.gradient_sensitivity import ChangeErrors, LayerChange, gradient_errors
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import QuantizationJob, first_pictures
from quantrack.quantization.layer_trials import trial_errors
from quantrack.quantization.step_cache import cached, step_keys
from quantrack.quantization.weight_scales import MseWeightScales, min_max_scale
from quantrack.schemes import Scheme

ESTIMATED, TRIED, SCORED = "gradient", "output", "mAP"
MEASURES = {  # and what an error then is
    ESTIMATED: "squared error of objects' logits and boxes, by gradients",
    TRIED: "divergence of raw outputs, by trials",
    SCORED: "mAP50-95 lost, by trials",
}
MOST_TOGETHER = 2**23  # weights that GPTQ rounds at a time: many small steps are slow one number of bits at a time
WEIGHTS_ONLY = Scheme("weights only", 4, None)


@dataclass(frozen=True)
class SensitivityMeasurement:
    """At which bits each layer is measured, and how.

    `measure` is `gradient`, or `output` for trials on the first `images` calibration pictures, or `mAP`.
    Weights are rounded by `Gptq` with this `weigh_all`.
    """

    bits: tuple[int, ...] = OFFERED_BITS
    measure: str = ESTIMATED
    images: int = 32
    gptq_images: int = 100
    weigh_all: bool = False

    def __post_init__(self) -> None:
        require_choice(self.bits)
        if self.measure not in MEASURES:
            raise UsageError(f"sensitivity: measure={self.measure}: use {' or '.join(MEASURES)}")
        if self.images < 1 or self.gptq_images < 1:
            raise UsageError("sensitivity: images and gptq_images must be positive")


@dataclass(frozen=True)
class RoundedLayer:
    """One convolution's weights on the grids of several numbers of bits, and its mean input columns [G, D]."""

    by_bits: Mapping[int, Tensor]
    mean_input: Tensor

    @property
    def weights(self) -> int:
        return next(iter(self.by_bits.values())).numel()


@dataclass(frozen=True)
class LayerSensitivity:
    """One convolution's row: `errors` by bits, to be compared within one measure only.

    By gradients, the squared error of a picture's objects; by outputs, `Divergence.outputs`; by mAP, what it loses.
    `channel_errors` are those of each output channel alone, where gradients told them.
    """

    name: str
    role: Role
    weights: int
    errors: Mapping[int, float]
    channel_errors: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def cost(self) -> LayerCost:
        return LayerCost(self.name, self.weights, self.errors)

    @property
    def parts(self) -> list[LayerCost]:
        """The cost of each output channel alone."""
        by_channel = list(zip(*self.channel_errors.values(), strict=True))
        weights = self.weights // len(by_channel)
        return [
            LayerCost(f"{self.name} {channel}", weights, dict(zip(self.channel_errors, errors, strict=True)))
            for channel, errors in enumerate(by_channel)
        ]

    def planned_error(self, bits: LayerBits) -> float:
        """The error at a plan's bits; those of channels add up."""
        if isinstance(bits, int):
            return self.errors[bits]
        return sum(self.channel_errors[each][channel] for channel, each in enumerate(bits))


def cached_sensitivity(job: QuantizationJob, settings: SensitivityMeasurement) -> tuple[LayerSensitivity, ...]:
    """The table by gradients or by outputs, measured once for the same model, pictures, settings and code.

    Activations do not enter it, so w4a8 and w4a16 share what is cached.
    """
    if settings.measure == SCORED:
        raise UsageError("sensitivity: measure=mAP needs a score: call measure_score_sensitivity")
    (key,) = step_keys(replace(job, scheme=WEIGHTS_ONLY, plan=None), [settings])
    return cached(job, "sensitivity", key, lambda: _table(job, settings), _records, _rows)


def _records(rows: Sequence[LayerSensitivity]) -> list[dict[str, object]]:
    return [asdict(row) | {"role": row.role.value} for row in rows]


def _rows(records: Sequence[Any]) -> tuple[LayerSensitivity, ...]:
    return tuple(
        LayerSensitivity(
            row["name"],
            Role(row["role"]),
            row["weights"],
            {int(bits): error for bits, error in row["errors"].items()},
            {int(bits): tuple(errors) for bits, errors in row["channel_errors"].items()},
        )
        for row in records
    )


def _table(job: QuantizationJob, settings: SensitivityMeasurement) -> tuple[LayerSensitivity, ...]:
    rounded = rounded_weights(job, settings)
    roles = convolution_roles(job.float_model)
    if settings.measure == ESTIMATED:
        estimated = estimated_errors(job, rounded)
        return tuple(_estimated_row(name, roles[name], rounded[name], errors) for name, errors in estimated.items())
    tried = tried_errors(job, rounded, settings)
    return tuple(LayerSensitivity(name, roles[name], layer.weights, tried[name]) for name, layer in rounded.items())


def _estimated_row(name: str, role: Role, layer: RoundedLayer, errors: Mapping[int, ChangeErrors]) -> LayerSensitivity:
    return LayerSensitivity(
        name,
        role,
        layer.weights,
        {bits: each.layer for bits, each in errors.items()},
        {bits: each.channels for bits, each in errors.items()},
    )


def estimated_errors(job: QuantizationJob, rounded: Mapping[str, RoundedLayer]) -> dict[str, dict[int, ChangeErrors]]:
    """The error of each convolution at each number of bits, alone, from gradients: a pass, and two back."""
    changes: dict[str, dict[int, LayerChange]] = {}
    for name, layer in rounded.items():
        convolution = job.float_model.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        differences = {bits: weight - convolution.weight for bits, weight in layer.by_bits.items()}
        changes[name] = {
            bits: LayerChange(change, mean_change(change, layer.mean_input, convolution.groups))
            for bits, change in differences.items()
        }
    return gradient_errors(job, changes)


def mean_change(change: Tensor, mean_input: Tensor, groups: int) -> Tensor:
    """What a change of weight [O, I/g, kh, kw] does to the mean outputs [O], for a mean input [G, D]."""
    return torch.einsum("god,gd->go", grouped(change, groups), mean_input).flatten()


def tried_errors(
    job: QuantizationJob, rounded: Mapping[str, RoundedLayer], settings: SensitivityMeasurement
) -> dict[str, dict[int, float]]:
    """The error of each convolution at each number of bits, alone; `job` is left as it was.

    Time: for each layer and number of bits a part of a pass over `images` pictures.
    """
    probe = copy.deepcopy(job.float_model)
    trials = {
        name: {bits: partial(weights_replaced, probe, name, weight) for bits, weight in layer.by_bits.items()}
        for name, layer in rounded.items()
    }
    few = first_pictures(job, settings.images)
    return trial_errors(few, probe, trials, lambda apart: apart.outputs, "sensitivity")


def measure_score_sensitivity(
    job: QuantizationJob, settings: SensitivityMeasurement, score: Callable[[nn.Module], float]
) -> tuple[LayerSensitivity, ...]:
    """The table with what a score of the whole detector loses, at least 0, as errors.

    `score` takes a detector, as `job.float_model` is one; it is called once a layer and number of bits.
    """
    rounded = rounded_weights(job, settings)
    probe = copy.deepcopy(job.float_model)
    whole = score(probe)
    roles = convolution_roles(probe)
    rows = []
    for name, layer in track(list(rounded.items()), "sensitivity by score"):
        errors = {}
        for bits, weight in layer.by_bits.items():
            with weights_replaced(probe, name, weight):
                errors[bits] = max(0.0, whole - score(probe))
        rows.append(LayerSensitivity(name, roles[name], layer.weights, errors))
    return tuple(rows)


def make_plan(
    job: QuantizationJob, rows: Sequence[LayerSensitivity], average_bits: float, plan_by: str = "layer"
) -> BitPlan:
    """The plan of least total error whose weighted average is at most `average_bits`.

    By `layer`, or by `channel`: each output channel has bits of its own. The head's outputs are planned by layer in
    any case: a channel there is a class, and of most classes a few pictures show nothing.

    Raises:
        UsageError: a plan by channel is asked for, and the measure told nothing of channels.
    """
    if plan_by == "channel" and not all(row.channel_errors for row in rows):
        raise UsageError(f"plan_by={plan_by}: the measure tells nothing of channels; use measure={ESTIMATED}")
    costs = {row.name: row.parts if plan_by == "channel" and row.role is not Role.HEAD_OUTPUT else [] for row in rows}
    chosen = solve_bits([cost for row in rows for cost in costs[row.name] or [row.cost]], average_bits)
    return BitPlan(
        job.model_digest,
        {name: tuple(chosen[part.name] for part in parts) if parts else chosen[name] for name, parts in costs.items()},
    )


def rounded_weights(job: QuantizationJob, settings: SensitivityMeasurement) -> dict[str, RoundedLayer]:
    """Every convolution's weights by module name, on their grids of each of the numbers of bits.

    Time: two passes over the GPTQ pictures, and one forward and back.
    """
    few = first_pictures(job, settings.gptq_images)
    trial = replace(few, model=copy.deepcopy(job.float_model), scheme=WEIGHTS_ONLY, plan=None)
    InsertQuantizers().apply(trial)  # says which convolutions there are
    rounded: dict[str, RoundedLayer] = {}
    # the curvatures are of the float network's inputs, so one walk serves all numbers of bits
    for by_name in float_curvatures(trial, Gptq(weigh_all=settings.weigh_all).sampling):
        for name, curvature in by_name.items():
            convolution = job.float_model.get_submodule(name)
            assert isinstance(convolution, nn.Conv2d)
            rounded[name] = RoundedLayer(rounded_at(convolution, curvature, settings.bits), curvature.mean)
    return rounded


def rounded_at(convolution: nn.Conv2d, curvature: Curvature, numbers: Sequence[int]) -> dict[int, Tensor]:
    """A convolution's weight [O, I/g, kh, kw] on its grid of each number of bits: MSE scales, then GPTQ."""
    gptq, float_weight = Gptq(), convolution.weight.detach()
    weight = grouped(float_weight, convolution.groups)
    together = max(1, MOST_TOGETHER // (len(gptq.scale_factors) * weight.numel()))
    found: dict[int, Tensor] = {}
    for start in range(0, len(numbers), together):
        some = numbers[start : start + together]
        scales = [MseWeightScales().search(float_weight, min_max_scale(float_weight, bits), bits) for bits in some]
        scale = torch.cat([each.reshape(convolution.groups, -1) for each in scales], dim=1)
        bits = torch.tensor(some, device=weight.device).repeat_interleave(weight.shape[1]).expand_as(scale)
        rounded, _ = gptq.rounded(weight.repeat(1, len(some), 1), scale, bits, curvature.centred)
        parts = rounded.chunk(len(some), dim=1)
        found |= {bits: part.reshape(float_weight.shape) for bits, part in zip(some, parts, strict=True)}
    return found


@contextmanager
def weights_replaced(model: nn.Module, name: str, weights: Tensor) -> Iterator[None]:
    """A model with other weights in one convolution, for a while."""
    own: Tensor = model.get_submodule(name).weight.data  # type: ignore[assignment]
    kept = own.clone()
    try:
        own.copy_(weights)
        yield
    finally:
        own.copy_(kept)
