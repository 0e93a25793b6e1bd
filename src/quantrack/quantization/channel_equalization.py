"""Step: divide the channels of each convolution's input so that fewer of them waste the common grid.

One scale serves all channels of an activation, so a channel of small values is rounded as coarsely as the
largest; one scale serves all weights of an output channel, so small weights are rounded as coarsely as its
largest. Dividing input channel i by s_i and multiplying its weights by s_i does not change the convolution and
adds no operator (the exporter puts the division into QuantizeLinear's scale), but shifts rounding error
between the two: Xiao et al., "SmoothQuant" (arXiv:2211.10438), with Nagel et al.'s cross-layer
equalization (arXiv:1906.04721) before it, which SiLU does not allow.

Here s is not a power of the ranges but what makes the estimated error of the layer's outputs least:

    a(s)^2 / 12 * sum_i s_i^2 sum_o w_oi^2  +  sum_o b_o(s)^2 / 12 * sum_i v / s_i^2

with the activations' step a and each output channel's weight step b_o, both set by the largest value, and v the
variance of an input that other inputs do not explain, as GPTQ makes up for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantrack.detector.roles import Role, convolution_roles
from quantrack.errors import UsageError
from quantrack.progress import track
from quantrack.quantization.job import ActivationStatistics, QuantizationJob
from quantrack.quantization.layers import (
    INT8_BITS,
    LayerPlan,
    QuantizedConvolution,
    channel_bits,
    equalize,
    layer_plan,
    quantized_layers,
    shaped,
    weight_range,
)
from quantrack.schemes import ACTIVATION_LEVELS

RATE = 0.04  # Adam's, of the logarithms of s, falling to zero
ADAM = (0.9, 0.999, 1e-8)  # its decays and its least denominator, as PyTorch sets them
LEAST = 1e-30  # error; a layer of zeros stays as it is
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ChannelEqualization:
    """Runs after the inputs were observed, and before any scale is chosen. Needs no further pictures.

    `unexplained` is the share of a channel's variance that enters v: 0.15 to 0.64 in YOLOv10n, and what it
    is within that moves the layers' errors by less than 1 %. A few pictures do not show how far a channel
    reaches (that of a rare class, for one), so each end of its range is taken for the mean, in logarithms, of
    itself and of the whole input's, which counts by `pooled`. Layers with 8-bit weights and float inputs stay
    as they are, and so does the first one where its input is quantized: a picture's values lie on the grid
    already. `iterations` are of gradient descent a layer, which reaches the least error to within 2 %.
    """

    unexplained: float = 0.4
    pooled: float = 0.25
    iterations: int = 300

    def __post_init__(self) -> None:
        if not 0 < self.unexplained <= 1 or not 0 <= self.pooled <= 1 or self.iterations < 1:
            raise UsageError("channel equalization: unexplained and pooled must lie in 0..1 and iterations be positive")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        before = after = count = 0.0
        statistics, roles = dict(job.statistics), convolution_roles(job.model)
        for name, layer in track(list(quantized_layers(job.model).items()), "equalizing channels"):
            plan = layer_plan(layer)
            if not gains(plan, roles[name]):
                continue
            divisors, errors = self.divisors(layer, statistics[name], plan.activation)
            equalize(layer, divisors.to(layer.weight.device))
            statistics[name] = statistics[name].divided(divisors)
            before, after, count = before + errors[0], after + errors[1], count + 1
        job.statistics = statistics
        return {"layers": count, "error_before": before, "error_after": after}

    def divisors(
        self, layer: QuantizedConvolution, seen: ActivationStatistics, activation: str | None
    ) -> tuple[Tensor, tuple[float, float]]:
        """What to divide the input's channels [I] by, of geometric mean 1; the estimated error before and with it."""
        error = self.layer_error(layer, seen, activation)
        logarithms = least_logarithms(error, self.iterations)
        found = logarithms - logarithms.mean()
        divisors = torch.from_numpy(np.exp(found)).to(layer.weight.dtype)
        return divisors, (error(np.zeros_like(found))[0], error(found)[0])

    def layer_error(
        self, layer: QuantizedConvolution, seen: ActivationStatistics, activation: str | None
    ) -> LayerError:
        """Of a layer whose input was observed, its weights still the float ones.

        In NumPy, its gradient written out: thousands of steps on a few hundred numbers cost PyTorch ten times as
        much to keep account of.
        """
        weight = layer.weight.detach().cpu().double()
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        limit = torch.as_tensor(-weight_range(shaped(channel_bits(layer), layer.groups, -1, 1))[0]).cpu()
        return LayerError(
            importance=grouped.square().sum(dim=(1, 3, 4)).flatten().numpy(),
            low=-self.reach(-seen.channel_minimum.cpu()).double().numpy(),
            high=self.reach(seen.channel_maximum.cpu()).double().numpy(),
            magnitudes=(grouped.abs().amax(dim=(3, 4)) / limit).numpy(),
            variance=self.unexplained * seen.channel_variance * weight.shape[2] * weight.shape[3],
            activation=activation,
        )

    def reach(self, seen: Tensor) -> Tensor:
        """How far channels [I] are taken to reach to one side of zero, of how far they were seen to."""
        own = seen.clamp_min(0)
        return own ** (1 - self.pooled) * own.max() ** self.pooled


def gains(plan: LayerPlan, role: Role) -> bool:
    """Whether a layer's rounding can gain by it."""
    return role is not Role.FIRST if plan.activation is not None else plan.weight_bits < INT8_BITS


def require_scales_of_tensors(model: nn.Module, wanted_for: str) -> None:
    """Refuse a quantized model with equalized channels, as a runtime wants one scale for all of them.

    Raises:
        UsageError: a convolution's channels are equalized.
    """
    for name, layer in quantized_layers(model).items():
        if layer.input_scale is not None:
            raise UsageError(
                f"{wanted_for}: {name}'s input channels are equalized; start from a run with the same {wanted_for}"
            )


@dataclass(frozen=True)
class LayerError:
    """The estimated squared error of a convolution's outputs, as a function of its divisors [I].

    `importance` [I] is the sum of each input's squared weights, `low` and `high` [I] its range, `magnitudes`
    [G, O/G, I/G] the largest weight of each kernel over the largest integer that its bits allow, `variance` v
    times the weights of a kernel.
    """

    importance: Array
    low: Array
    high: Array
    magnitudes: Array
    variance: float
    activation: str | None

    def __call__(self, logarithms: Array) -> tuple[float, Array]:
        """The error at these logarithms of divisors [I], and its gradient by them, shape [I].

        Where several are largest, the gradient is the mean of theirs.
        """
        divisors = np.exp(logarithms)
        of_weights, gradient = self.of_weights(divisors)
        if self.activation is None:
            return of_weights, gradient
        of_activations, other = self.of_activations(divisors)
        return of_weights + of_activations, gradient + other

    def of_activations(self, divisors: Array) -> tuple[float, Array]:
        """What rounding the divided inputs does."""
        low, high = self.low / divisors, self.high / divisors
        lowest, highest = low.min(), high.max()
        if self.activation == "asymmetric":
            ends = [(low == lowest, -lowest), (high == highest, highest)]
        else:
            ends = [(high == highest, 2 * highest) if highest >= -lowest else (low == lowest, -2 * lowest)]
        step = sum(length for _, length in ends) / ACTIVATION_LEVELS
        weights = self.importance * np.square(divisors)
        gradient = 2 * np.square(step) * weights
        for largest, length in ends:
            gradient -= 2 * step * weights.sum() * length / ACTIVATION_LEVELS * largest / largest.sum()
        return float(np.square(step) * weights.sum() / 12), gradient / 12

    def of_weights(self, divisors: Array) -> tuple[float, Array]:
        """What rounding the multiplied weights does."""
        own = divisors.reshape(len(self.magnitudes), 1, -1)
        multiplied = self.magnitudes * own
        largest, squares = multiplied.argmax(axis=2), np.square(multiplied.max(axis=2, keepdims=True))
        inverse = 1 / np.square(own)
        of_steps, of_inverse = squares.sum(axis=1, keepdims=True), inverse.sum(axis=2, keepdims=True)
        at = (largest + own.shape[2] * np.arange(len(own))[:, None]).flatten()
        rising = np.bincount(at, weights=squares.flatten(), minlength=own.size).reshape(own.shape)
        gradient = 2 * (rising * of_inverse - of_steps * inverse)
        return float((of_steps * of_inverse).sum() * self.variance / 12), gradient.flatten() * self.variance / 12


def least_logarithms(error: LayerError, iterations: int) -> Array:
    """Where the logarithm of an error is least, found by Adam (Kingma and Ba, arXiv:1412.6980) from zero on.

    Quasi-Newton methods get stuck where the largest of several values changes.
    """
    first_decay, second_decay, least = ADAM
    logarithms = np.zeros_like(error.importance)
    mean, square = np.zeros_like(logarithms), np.zeros_like(logarithms)
    for iteration in range(iterations):
        value, gradient = error(logarithms)
        gradient = gradient / max(value, LEAST)
        mean += (1 - first_decay) * (gradient - mean)
        square += (1 - second_decay) * (np.square(gradient) - square)
        unbiased = mean / (1 - first_decay ** (iteration + 1))
        spread = np.sqrt(square / (1 - second_decay ** (iteration + 1)))
        logarithms -= RATE * (1 - iteration / iterations) * unbiased / (spread + least)
    return logarithms
