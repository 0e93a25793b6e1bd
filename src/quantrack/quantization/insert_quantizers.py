"""Step: choose each convolution's bits by its role, and insert the quantizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from quantrack.detector.roles import Role, convolution_roles
from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import say
from quantrack.quantization.bit_plan import LayerBits
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    ACTIVATION_QUANTIZERS,
    NOTHING_QUANTIZED,
    LayerPlan,
    bits_per_channel,
    insert_quantizers,
    quantized_layers,
)

FLOAT_BITS = 32


@dataclass(frozen=True)
class InsertQuantizers:
    """Every convolution gets the scheme's bits, but for the roles kept at 8 bits or float.

    First, depthwise and head-output convolutions are few weights and much accuracy: at 8 bits they
    cost 1 % of the weights of YOLOv10m. Where the job has a bit plan, that decides instead.
    """

    activation: str = "asymmetric"
    roles_at_8_bits: tuple[Role, ...] = (Role.FIRST, Role.DEPTHWISE, Role.HEAD_OUTPUT)
    float_roles: tuple[Role, ...] = (Role.DFL,)

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATION_QUANTIZERS:
            known = " or ".join(ACTIVATION_QUANTIZERS)
            raise UsageError(f"activation={self.activation}: unknown; use {known}")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        plan = self.plan(job)
        if not plan:
            raise QuantrackError(NOTHING_QUANTIZED)
        insert_quantizers(job.model, plan)
        _say_what_else_stays_float(job.float_model)
        return {
            "layers": float(len(quantized_layers(job.model))),
            "weight_bits_avg": average_weight_bits(job.model),
        }

    def plan(self, job: QuantizationJob) -> dict[str, LayerPlan]:
        """The bits of every convolution that is quantized at all."""
        activation = self.activation if job.scheme.activation_bits is not None else None
        roles = convolution_roles(job.model)
        if job.plan is not None:
            # a plan never holds DFL's fixed weights, whatever the recipe does with them
            names = [name for name, role in roles.items() if role is not Role.DFL]
            job.plan.require_fits(job.model_digest, names)
            return {name: _planned(job.model, name, job.plan.bits[name], activation) for name in names}
        return {
            name: LayerPlan(8 if role in self.roles_at_8_bits else job.scheme.weight_bits, activation)
            for name, role in roles.items()
            if role not in self.float_roles
        }


def _planned(model: nn.Module, name: str, bits: LayerBits, activation: str | None) -> LayerPlan:
    if isinstance(bits, int):
        return LayerPlan(bits, activation)
    own = len(model.get_submodule(name).weight)  # type: ignore[arg-type]
    if len(bits) != own:
        raise QuantrackError(
            f"plan: {name} has {len(bits)} channels there, {own} in the model; run `sensitivity` on this model"
        )
    return LayerPlan(max(bits), activation, bits)


def _say_what_else_stays_float(model: nn.Module) -> None:
    """Layers of kinds that are never quantized, such as a transformer's; they count in no average of bits."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    others = {name: owner for name, owner in owners.items() if not isinstance(owner, nn.Conv2d)}
    if others:
        share = sum(weights[name].numel() for name in others) / sum(weight.numel() for weight in weights.values())
        kinds = ", ".join(sorted({type(owner).__name__ for owner in others.values()}))
        say(f"{len(others)} layers stay float ({kinds}), {share:.1%} of the weights: only Conv2d is quantized")


def average_weight_bits(model: nn.Module) -> float:
    """Mean bits over the weights of all convolutions, 32 where a recipe leaves them float.

    A float DFL is left out: its 16 weights are constants.
    """
    return _average(model, lambda bits: bits)


def average_stored_bits(model: nn.Module, weight_storage: str) -> float:
    """As `average_weight_bits`, of the ONNX types that the weights are stored in.

    INT8, and with `weight_storage` "int4" INT4 up to 4 bits, a few channels aside that are not worth packing.
    """
    return _average(model, lambda bits: 4 if weight_storage == "int4" and bits <= 4 else 8)


def _average(model: nn.Module, counted_as: Callable[[int], int]) -> float:
    layers = quantized_layers(model)
    total = sum(
        layer.weight[0].numel() * sum(counted_as(bits) for bits in bits_per_channel(layer)) for layer in layers.values()
    )
    count = sum(layer.weight.numel() for layer in layers.values())
    roles = convolution_roles(model)
    left_float = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name not in layers and roles[name] is not Role.DFL
    )
    return float((total + FLOAT_BITS * left_float) / (count + left_float))
