"""Plain PyTorch twins of the quantized convolutions, made for training.

They compute what Brevitas' layers compute, with fewer passes over memory, and their parameters are
scaled so that one learning rate suits all channels: weights in steps of a 4-bit grid over their channel's
range, scales as logarithms of their change. Gradients pass rounding straight through (Bengio et al.,
arXiv:1308.3432) and stop at clipped values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from quantrack.quantization.layers import (
    Bits,
    QuantizedConvolution,
    activation_quantization,
    clamp_integers,
    equalized_weight,
    quantized_layers,
    set_activation_range,
    set_bias,
    set_weight_scale,
    weight_bits,
    weight_limit,
    weight_scale,
)

EDGE = 0.45  # of a rounding interval, half of which is 0.5
COMMON_BITS = 4  # the grid in whose steps all weights are learned


class _Round(torch.autograd.Function):
    """Round to nearest; the gradient as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - torch's untyped context
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return gradient


class FakeQuantize(torch.autograd.Function):
    """Round to an integer grid and back; clipped values get no gradient.

    `log_change` is the logarithm of a factor of the scale; its gradient is that of learned step size
    quantization (Esser et al., arXiv:1902.08153): of the rounding error, or of the clipped value.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        log_change: Tensor,
        grid: tuple[float, int, int, int],
    ) -> Tensor:
        scale, zero_point, lowest, highest = grid
        step = scale * log_change.exp()
        integers = torch.round(x / step).add_(zero_point)
        inside = (integers >= lowest) & (integers <= highest)
        output = integers.clamp_(lowest, highest).sub_(zero_point).mul_(step)
        ctx.save_for_backward(inside, output - x * inside)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        inside, by_scale = ctx.saved_tensors
        return gradient * inside, (gradient * by_scale).sum(), None


class TrainableConvolution(nn.Module):
    """A convolution with `common_steps`, `log_change` of the scales, and a bias.

    `common_steps` are the weights in steps of a 4-bit grid over the range of their channel, whatever bits the channel
    has; `units`, the weights over their scale, follow from them. `input_log_change` is that of its input's scale; where
    activations stay float it has no effect.

    `set_rounding` replaces the way in which units become integers, which is straight through at first.
    """

    def __init__(self, layer: QuantizedConvolution, float_weight: Tensor) -> None:
        super().__init__()
        scale = weight_scale(layer)
        self.bits = weight_bits(layer)
        self.channel_bits: Tensor | None
        self.register_buffer("channel_bits", None if layer.channel_bits is None else layer.channel_bits.clone())
        self.scale: Tensor
        self.register_buffer("scale", scale.clone())
        self.input_scale: Tensor | None
        self.register_buffer("input_scale", None if layer.input_scale is None else layer.input_scale.clone())
        wanted = equalized_weight(float_weight.detach(), layer)
        units = latent_units(layer.weight.detach(), wanted, scale, self.bits_of_weights)
        self.common_steps = nn.Parameter(units / self.units_in_common_step)
        self.log_change = nn.Parameter(torch.zeros_like(scale))
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().clone()
        self.bias = nn.Parameter(bias)
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        chosen = activation_quantization(layer)
        self.input_grid = None if chosen is None else chosen.grid
        self.input_log_change = nn.Parameter(torch.zeros((), device=scale.device))
        # in a list, so that torch does not take a module given for it as a part of this one
        self.rounding: list[Callable[[Tensor], Tensor]] = [self.round_straight_through]

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale
        if self.input_grid is not None:
            x = FakeQuantize.apply(x.float(), self.input_log_change, self.input_grid)  # type: ignore[no-untyped-call]
        if torch.is_autocast_enabled(x.device.type):
            return self._in_mixed_precision(x)
        output: Tensor = conv2d(x, self.weight(), self.bias, *self.geometry)
        return output

    def _in_mixed_precision(self, x: Tensor) -> Tensor:
        """As `forward`, of integers: bfloat16 holds all of 8 bits, but rounds other values by up to half a step."""
        step = 1.0 if self.input_grid is None else self.input_grid[0] * self.input_log_change.detach().exp()
        scale = self.current_scale().detach()
        integers = self.weight() / scale[:, None, None, None]
        output: Tensor = conv2d(x / step, integers, None, *self.geometry)
        return output.float() * (step * scale)[:, None, None] + self.bias[:, None, None]

    def weight(self) -> Tensor:
        """The weights on their grid, shape [O, I/g, kh, kw]."""
        return self.rounding[0](self.units) * self.current_scale()[:, None, None, None]

    @property
    def units(self) -> Tensor:
        """The weights over their scale, not rounded, shape [O, I/g, kh, kw]."""
        return self.common_steps * self.units_in_common_step

    @property
    def units_in_common_step(self) -> float | Tensor:
        """Steps of the own grid in one of the 4-bit grid: 127 / 7 at 8 bits, 3 / 7 at 3; [O, 1, 1, 1] by channel."""
        return weight_limit(self.bits_of_weights) / weight_limit(COMMON_BITS)

    @property
    def bits_of_weights(self) -> Bits:
        """Bits of all weights, or of each output channel's, [O, 1, 1, 1]."""
        return self.bits if self.channel_bits is None else self.channel_bits[:, None, None, None]

    def current_scale(self) -> Tensor:
        """The scale per output channel, shape [O]."""
        return self.scale * self.log_change.exp()

    def set_rounding(self, rounding: Callable[[Tensor], Tensor]) -> None:
        """Let another function turn units into integers (or, in training, into something between)."""
        self.rounding = [rounding]

    def round_straight_through(self, units: Tensor) -> Tensor:
        """The nearest integers within the limits."""
        rounded: Tensor = _Round.apply(clamp_integers(units, self.bits_of_weights))  # type: ignore[no-untyped-call]
        return rounded


def latent_units(weight: Tensor, float_weight: Tensor, scale: Tensor, bits: Bits) -> Tensor:
    """Where training starts: the integers that `weight` rounds to, each moved towards the float weight.

    Weights that lie on the grid, as GPTQ leaves them, would all be equally far from changing; those
    that the float weight speaks against change first.
    """
    step = scale[:, None, None, None]
    integers = torch.round(weight / step)
    return clamp_integers(torch.clamp(float_weight / step, integers - EDGE, integers + EDGE), bits)


def trainable_twin(model: nn.Module, float_model: nn.Module) -> nn.Module:
    """A copy of a quantized model in which every quantized convolution can be trained."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for name, layer in quantized_layers(model).items():
        float_weight: Tensor = float_model.get_submodule(name).weight  # type: ignore[assignment]
        twin.set_submodule(name, TrainableConvolution(layer, float_weight))
    return twin


def trainable_layers(twin: nn.Module) -> dict[str, TrainableConvolution]:
    """The trainable convolutions by module name, in module order."""
    return {name: module for name, module in twin.named_modules() if isinstance(module, TrainableConvolution)}


@dataclass(frozen=True)
class Rates:
    """Learning rates: `weights` in steps of a 4-bit grid, `scales` relative, `biases` absolute."""

    weights: float
    scales: float
    biases: float


def parameter_groups(twin: nn.Module, rates: Rates) -> list[dict[str, object]]:
    """What an optimizer takes: weights, scales and biases of all layers, each with its rate and name."""
    layers = trainable_layers(twin).values()
    scales = [change for layer in layers for change in (layer.log_change, layer.input_log_change)]
    return [
        {"params": [layer.common_steps for layer in layers], "lr": rates.weights, "param_group": "weights"},
        {"params": scales, "lr": rates.scales, "param_group": "scales"},
        {"params": [layer.bias for layer in layers], "lr": rates.biases, "param_group": "biases"},
    ]


@torch.no_grad()
def take_over(model: nn.Module, trained_layers: Mapping[str, TrainableConvolution]) -> None:
    """Give the quantized model the trained layers' rounded weights, scales and biases, and inputs' scales."""
    layers = quantized_layers(model)
    for name, trained in trained_layers.items():
        layer = layers[name]
        set_weight_scale(layer, trained.current_scale())
        layer.weight.data.copy_(trained.weight())
        chosen = activation_quantization(layer)
        if chosen is not None:
            learned = replace(chosen, scale=chosen.scale * float(trained.input_log_change.exp()))
            set_activation_range(layer, *learned.range)
        set_bias(layer, trained.bias)
