"""Brevitas convolutions with explicit scales: make them, find them, set and read their scales.

Scales and zero points are parameters (not statistics that Brevitas recomputes), so that each step
of a recipe can choose them, and training can learn them as in LSQ (arXiv:1902.08153).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import brevitas.nn as qnn
import torch
from brevitas.core.quant import IntQuant as QuantizeToIntegers
from brevitas.core.zero_point import ParameterZeroPoint
from brevitas.inject import this
from brevitas.inject.enum import ScalingImplType
from brevitas.quant.base import (
    IntQuant,
    PerChannelFloatScaling8bit,
    PerTensorFloatScaling8bit,
    UintQuant,
)
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from torch import Tensor, nn

from quantrack.detector.blocks import Block
from quantrack.errors import QuantrackError

INT8_BITS = 8
Bits = int | Tensor  # of all weights of a layer, or of each output channel
B = TypeVar("B", bound=Bits)
UNSET = 12345.0  # marks a scale that no step has set yet; no calibration gives this very number


class Clamp(nn.Module):
    """What Brevitas' `TensorClamp` computes, in two operators, not four, which are a third of a quantized pass."""

    def __init__(self) -> None:  # Brevitas' injector refuses PyTorch's own, which takes any arguments
        super().__init__()

    def forward(self, x: Tensor, min_val: Tensor, max_val: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(x, max_val), min_val)  # in half the time of torch.clamp with tensors


class QuantizeInPlace(QuantizeToIntegers):
    """Equal to the bit to Brevitas' `IntQuant`; without gradients in one buffer, in a quarter of the time on a CPU.

    Of quantizers that round to nearest from the first step on and see their input as it is, as all here do.
    """

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            y: Tensor = super().forward(scale, zero_point, bit_width, x)
            return y
        y = (x / scale).add_(zero_point).round_()
        torch.minimum(y, self.max_int(bit_width), out=y)
        torch.maximum(y, self.min_int(bit_width), out=y)
        return y.sub_(zero_point).mul_(scale)


class QuantizeChannels(QuantizeInPlace):
    """As `QuantizeInPlace`, of weights [O, I/g, kh, kw] whose output channels may each have bits of their own."""

    lowest: Tensor
    highest: Tensor

    def keep_to(self, bits: Tensor) -> None:
        """Take no integer beyond each channel's bits [O], of which Brevitas knows only the most."""
        for name, limit in zip(("lowest", "highest"), weight_range(bits.reshape(-1, 1, 1, 1)), strict=True):
            self.register_buffer(name, limit.float(), persistent=False)

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        if "lowest" in self._buffers:
            x = torch.maximum(torch.minimum(x, self.highest * scale), self.lowest * scale)
        return super().forward(scale, zero_point, bit_width, x)


class WeightPerChannel(IntQuant, PerChannelFloatScaling8bit, WeightQuantSolver):
    """Weights with zero point 0 and one scale per output channel, in the range of `weight_range`."""

    int_quant = QuantizeChannels
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_init = UNSET
    tensor_clamp_impl = Clamp


class SymmetricActivation(IntQuant, PerTensorFloatScaling8bit, ActQuantSolver):
    """Signed INT8 activations, one scale per tensor, zero point 0."""

    int_quant = QuantizeInPlace
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_init = UNSET
    tensor_clamp_impl = Clamp


class AsymmetricActivation(UintQuant, PerTensorFloatScaling8bit, ActQuantSolver):
    """Unsigned INT8 activations, one scale and one zero point per tensor."""

    int_quant = QuantizeInPlace
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_init = UNSET
    tensor_clamp_impl = Clamp
    quantize_zero_point = True
    zero_point_impl = ParameterZeroPoint
    zero_point_init = 0.0
    zero_point_shape = this.scaling_shape


ACTIVATION_QUANTIZERS = {"symmetric": SymmetricActivation, "asymmetric": AsymmetricActivation}


class QuantizedConvolution(qnn.QuantConv2d):
    """Brevitas' convolution, of an input whose channels are multiplied by `input_scale` [1, I, 1, 1] first.

    None, where no step has equalized channels: the input is taken as it is. `channel_bits` [O] are the bits of each
    output channel's weights, None where all have those of the quantizer.
    """

    input_scale: Tensor | None
    channel_bits: Tensor | None

    def __init__(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401 - Brevitas is untyped
        super().__init__(*arguments, **settings)
        self.register_buffer("input_scale", None)
        self.register_buffer("channel_bits", None)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x if self.input_scale is None else x * self.input_scale)
        return output


@dataclass(frozen=True)
class LayerPlan:
    """How one convolution is quantized; `activation` is None where its input stays float.

    `channel_bits` are the bits of each output channel's weights, `weight_bits` at most; None where all have these.
    """

    weight_bits: int
    activation: str | None
    channel_bits: tuple[int, ...] | None = None


NOTHING_QUANTIZED = "recipe: no convolution is quantized; give insert_quantizers other float_roles"


def insert_quantizers(model: nn.Module, plan: Mapping[str, LayerPlan]) -> None:
    """Replace the planned convolutions by Brevitas' quantized ones, in place, scales still unset.

    Brevitas' own `layerwise_quantize` builds its layers on the meta device, where explicit scales
    cannot be made.

    Raises:
        QuantrackError: a convolution's channels are equalized already, so that its weights are not the float ones, or
            it pads with something else than zeros.
    """
    for name, layer_plan in plan.items():
        convolution = model.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        if convolution.padding_mode != "zeros":
            raise QuantrackError(
                f"insert quantizers: {name} pads by {convolution.padding_mode}; only zeros are supported, so leave its "
                "role float"
            )
        if getattr(convolution, "input_scale", None) is not None:
            raise QuantrackError(f"insert quantizers: {name}'s channels are equalized already; insert them first, once")
        model.set_submodule(name, _quantized_twin(convolution, layer_plan))


def _quantized_twin(convolution: nn.Conv2d, plan: LayerPlan) -> QuantizedConvolution:
    """The same convolution, its weights shared, with quantizers."""
    twin = QuantizedConvolution(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
        groups=convolution.groups,
        bias=convolution.bias is not None,
        weight_quant=WeightPerChannel,
        weight_bit_width=plan.weight_bits,
        weight_narrow_range=plan.weight_bits >= INT8_BITS,
        input_quant=ACTIVATION_QUANTIZERS[plan.activation] if plan.activation else None,
        return_quant_tensor=False,
    )
    twin.weight = convolution.weight
    twin.bias = convolution.bias
    if plan.channel_bits is not None:
        twin.channel_bits = torch.tensor(plan.channel_bits)
        twin.weight_quant.tensor_quant.int_quant.keep_to(twin.channel_bits)
    twin.to(convolution.weight.device).eval().requires_grad_(False)
    return twin


def layer_plans(model: nn.Module) -> dict[str, LayerPlan]:
    """How each quantized convolution is quantized: what `insert_quantizers` was given."""
    return {name: layer_plan(layer) for name, layer in quantized_layers(model).items()}


def layer_plan(layer: QuantizedConvolution) -> LayerPlan:
    """How one convolution is quantized."""
    own = None if layer.channel_bits is None else tuple(layer.channel_bits.tolist())
    return LayerPlan(weight_bits(layer), _activation_kind(layer), own)


def _activation_kind(layer: QuantizedConvolution) -> str | None:
    if not layer.input_quant.is_quant_enabled:
        return None
    return "symmetric" if layer.input_quant.is_signed else "asymmetric"


def scales_are_set(model: nn.Module) -> bool:
    """Whether every quantizer of a quantized model has been given its scale."""
    scalings = [scaling for layer in quantized_layers(model).values() for scaling in _scalings(layer)]
    return bool(scalings) and not any(bool((scaling == UNSET).all()) for scaling in scalings)


def require_scales(model: nn.Module, step: str) -> None:
    """Check that every quantizer has its scale before a step works with it, which would take any number for one.

    Raises:
        QuantrackError: one has none.
    """
    if quantized_layers(model) and not scales_are_set(model):
        raise QuantrackError(
            f"recipe: {step}: not every quantizer has a scale yet; put steps such as mse_weight_scales and, for INT8 "
            "activations, min_max_activation_ranges before it"
        )


def _scalings(layer: QuantizedConvolution) -> list[Tensor]:
    """The parameters that hold a layer's scales."""
    quantizers = [layer.weight_quant]
    if layer.input_quant.is_quant_enabled:
        quantizers.append(layer.input_quant.fused_activation_quant_proxy)
    return [quantizer.tensor_quant.scaling_impl.value for quantizer in quantizers]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedConvolution]:
    """The quantized convolutions by module name, in module order."""
    return dict(_quantized_below(model, ""))


def _quantized_below(module: nn.Module, prefix: str) -> Iterator[tuple[str, QuantizedConvolution]]:
    """Without what is inside of them: nine tenths of a quantized model's modules are Brevitas' own."""
    for name, child in module.named_children():
        if isinstance(child, QuantizedConvolution):
            yield f"{prefix}{name}", child
        else:
            yield from _quantized_below(child, f"{prefix}{name}.")


def layers_of_block(model: nn.Module, block: Block) -> dict[str, QuantizedConvolution]:
    """The quantized convolutions of one block, by module name."""
    return {name: layer for name, layer in quantized_layers(model).items() if block.holds(name)}


def quantized_input(layer: QuantizedConvolution, x: Tensor) -> Tensor:
    """The input through its quantizer, or as it is where that is off; what equalizes channels is undone."""
    if layer.input_scale is None:
        seen: Tensor = getattr(layer.input_quant(x), "value", x)
        return seen
    scaled = x * layer.input_scale
    seen = getattr(layer.input_quant(scaled), "value", scaled)
    return seen / layer.input_scale


def equalize(layer: QuantizedConvolution, divisors: Tensor) -> None:
    """Divide the input's channels by `divisors` [I], and multiply the weights by them; both must be unquantized yet."""
    if layer.input_scale is not None:
        raise QuantrackError("this convolution's channels are equalized already")
    layer.input_scale = (1 / divisors).reshape(1, -1, 1, 1)
    layer.weight.data.mul_(of_weight_columns(divisors, layer))


def of_weight_columns(channels: Tensor, layer: nn.Conv2d) -> Tensor:
    """A value of each input channel [I], where a weight [O, I/g, kh, kw] has it, broadcastable."""
    if layer.groups == 1:
        return channels.reshape(1, -1, 1, 1)
    of_groups = channels.reshape(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, dim=0)
    return of_groups[:, :, None, None]


def equalized_weight(float_weight: Tensor, layer: QuantizedConvolution) -> Tensor:
    """A float convolution's weight as it must be after the layer has equalized its input's channels."""
    if layer.input_scale is None:
        return float_weight
    return float_weight / of_weight_columns(layer.input_scale.flatten(), layer)


def weight_bits(layer: QuantizedConvolution) -> int:
    """Bits of the layer's weights, most where channels differ; asking the proxy would quantize them all to answer."""
    return int(layer.weight_quant.tensor_quant.msb_clamp_bit_width_impl().item())


def channel_bits(layer: QuantizedConvolution) -> Bits:
    """Bits of the layer's weights: a number, or one of each output channel, [O], where they differ."""
    return weight_bits(layer) if layer.channel_bits is None else layer.channel_bits


def bits_per_channel(layer: QuantizedConvolution) -> list[int]:
    """Bits of each output channel's weights."""
    if layer.channel_bits is None:
        return [weight_bits(layer)] * layer.out_channels
    return [int(bits) for bits in layer.channel_bits.tolist()]


def shaped(bits: Bits, *shape: int) -> Bits:
    """Bits of each channel in another shape; a number stays one."""
    return bits.reshape(shape) if isinstance(bits, Tensor) else bits


def weight_limit(bits: B) -> B:
    """The largest integer of a weight: 7 at 4 bits, 127 at 8."""
    limit: B = 2 ** (bits - 1) - 1  # type: ignore[assignment]
    return limit


def weight_range(bits: B) -> tuple[B, B]:
    """The smallest and largest integer of a weight.

    All of them below 8 bits (-8 to 7 at 4), as without -8 GPTQ's error at 4 bits is a tenth larger;
    -127 to 127 at 8 bits, as integer kernels want it.
    """
    limit = weight_limit(bits)
    lowest: B = -limit - 1 * (bits < INT8_BITS)  # type: ignore[assignment]
    return lowest, limit


def clamp_integers(integers: Tensor, bits: Bits) -> Tensor:
    """Integers within the range of so many bits: -8 to 7 at 4 bits."""
    lowest, highest = weight_range(bits)
    return integers.clamp(lowest, highest)  # type: ignore[arg-type]


def set_weight_scale(layer: QuantizedConvolution, scale: Tensor) -> None:
    """Set the scale per output channel, shape [out_channels]."""
    parameter = layer.weight_quant.tensor_quant.scaling_impl.value
    lowest, _ = weight_range(weight_bits(layer))
    parameter.data.copy_((scale * -lowest).reshape(parameter.shape))  # Brevitas keeps the range, not the step


def weight_scale(layer: QuantizedConvolution) -> Tensor:
    """The scale per output channel, shape [out_channels]."""
    scale: Tensor = layer.quant_weight().scale
    return scale.detach().reshape(-1)


def set_bias(layer: QuantizedConvolution, bias: Tensor) -> None:
    """Set the bias, shape [out_channels]; a layer without one gets it."""
    layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)


def set_activation_range(layer: QuantizedConvolution, minimum: float, maximum: float) -> None:
    """Set the input quantizer's range; a symmetric one covers the larger side."""
    quantizer = layer.input_quant.fused_activation_quant_proxy.tensor_quant
    scaling = quantizer.scaling_impl.value
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    if isinstance(quantizer.zero_point_impl, ParameterZeroPoint):
        scaling.data.fill_(max(high - low, 1e-8))
        quantizer.zero_point_impl.value.data.fill_(-low)
    else:
        # signed integers reach 127 upwards; Brevitas divides the range by 128
        scaling.data.fill_(max(-low, high, 1e-8) * 128 / 127)


@contextmanager
def another_activation_range(layer: QuantizedConvolution, minimum: float, maximum: float) -> Iterator[None]:
    """The input quantizer with this range for a while, then to the bit with its own again."""
    kept = [parameter.data.clone() for parameter in layer.input_quant.parameters()]
    try:
        set_activation_range(layer, minimum, maximum)
        yield
    finally:
        for parameter, own in zip(layer.input_quant.parameters(), kept, strict=True):
            parameter.data.copy_(own)


@dataclass(frozen=True)
class ActivationQuantization:
    """An input quantizer as the exported graph states it."""

    scale: float
    zero_point: int
    signed: bool

    @property
    def grid(self) -> tuple[float, int, int, int]:
        """Scale, zero point, and the lowest and highest integer."""
        return (self.scale, self.zero_point, *((-128, 127) if self.signed else (0, 255)))

    @property
    def range(self) -> tuple[float, float]:
        """The range that `set_activation_range` makes this grid of."""
        if self.signed:  # one integer more lies below zero than above
            return (-127 * self.scale, 127 * self.scale)
        return (self.minimum, self.maximum)

    @property
    def minimum(self) -> float:
        scale, zero_point, lowest, _ = self.grid
        return (lowest - zero_point) * scale

    @property
    def maximum(self) -> float:
        scale, zero_point, _, highest = self.grid
        return (highest - zero_point) * scale


def activation_quantization(layer: QuantizedConvolution) -> ActivationQuantization | None:
    """The input quantizer's scale and zero point; None where activations stay float."""
    proxy = layer.input_quant
    if not proxy.is_quant_enabled:
        return None
    scale, zero_point = float(proxy.scale()), round(float(proxy.zero_point()))
    return ActivationQuantization(scale, zero_point, bool(proxy.is_signed))


def fake_quantize(weight: Tensor, scale: Tensor, bits: Bits) -> Tensor:
    """Round a weight [O, I/g, kh, kw] to its grid and back; scale has shape [O]."""
    step = scale.reshape(-1, 1, 1, 1)
    return clamp_integers(torch.round(weight / step), shaped(bits, -1, 1, 1, 1)) * step
