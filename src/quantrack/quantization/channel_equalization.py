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

import torch
from torch import Tensor, nn

from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import track
from quantrack.quantization.activation_ranges import LEVELS
from quantrack.quantization.job import ActivationStatistics, QuantizationJob
from quantrack.quantization.layers import (
    INT8_BITS,
    Bits,
    QuantizedConvolution,
    channel_bits,
    equalize,
    layer_plan,
    quantized_layers,
    shaped,
    weight_range,
)

RATE = 0.06  # Adam's, of the logarithms of s
LEAST = 1e-30  # error; a layer of zeros stays as it is


@dataclass(frozen=True)
class ChannelEqualization:
    """Runs after the inputs were observed, and before any scale is chosen. Needs no further pictures.

    `unexplained` is the share of a channel's variance that enters v: 0.15 to 0.64 in YOLOv10n, and what it
    is within that moves the layers' errors by less than 1 %. A few pictures do not show how far a channel
    reaches (that of a rare class, for one), so each end of its range is taken for the mean, in logarithms, of
    itself and of the whole input's, which counts by `pooled`. Layers with 8-bit weights and float inputs stay
    as they are. `iterations` are of gradient descent a layer.
    """

    unexplained: float = 0.4
    pooled: float = 0.25
    iterations: int = 150

    def __post_init__(self) -> None:
        if not 0 < self.unexplained <= 1 or not 0 <= self.pooled <= 1 or self.iterations < 1:
            raise UsageError("channel equalization: unexplained and pooled must lie in 0..1 and iterations be positive")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        before = after = count = 0.0
        statistics = dict(job.statistics)
        for name, layer in track(list(quantized_layers(job.model).items()), "equalizing channels"):
            plan = layer_plan(layer)
            if plan.activation is None and plan.weight_bits >= INT8_BITS:
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
        logarithms = torch.zeros_like(error.importance, requires_grad=True)
        optimizer = torch.optim.Adam([logarithms], lr=RATE)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.iterations)
        with torch.enable_grad():
            for _ in range(self.iterations):
                optimizer.zero_grad()
                error(logarithms.exp()).clamp_min(LEAST).log().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                decay.step()
        found = (logarithms - logarithms.mean()).detach().exp()
        return found, (float(error(torch.ones_like(found))), float(error(found)))

    def layer_error(
        self, layer: QuantizedConvolution, seen: ActivationStatistics, activation: str | None
    ) -> LayerError:
        """Of a layer whose input was observed, its weights still the float ones.

        On the CPU: thousands of steps on a few hundred numbers cost a GPU more to launch than to compute.
        """
        weight = layer.weight.detach().cpu()
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        return LayerError(
            importance=grouped.square().sum(dim=(1, 3, 4)).flatten(),
            low=-self.reach(-seen.channel_minimum.cpu()),
            high=self.reach(seen.channel_maximum.cpu()),
            magnitudes=grouped.abs().amax(dim=(3, 4)),
            limit=-weight_range(shaped(channel_bits(layer), layer.groups, -1))[0],
            variance=self.unexplained * seen.channel_variance * weight.shape[2] * weight.shape[3],
            activation=activation,
        )

    def reach(self, seen: Tensor) -> Tensor:
        """How far channels [I] are taken to reach to one side of zero, of how far they were seen to."""
        own = seen.clamp_min(0)
        return own ** (1 - self.pooled) * own.max() ** self.pooled


def require_scales_of_tensors(model: nn.Module, wanted_for: str) -> None:
    """Refuse a quantized model with equalized channels, as a runtime wants one scale for all of them.

    Raises:
        QuantrackError: a convolution's channels are equalized.
    """
    for name, layer in quantized_layers(model).items():
        if layer.input_scale is not None:
            raise QuantrackError(
                f"{wanted_for}: {name}'s input channels are equalized; start from a run with the same {wanted_for}"
            )


@dataclass(frozen=True)
class LayerError:
    """The estimated squared error of a convolution's outputs, as a function of its divisors [I].

    `importance` [I] is the sum of each input's squared weights, `low` and `high` [I] its range, `magnitudes`
    [G, O/G, I/G] the largest weight of each kernel, `limit` the largest
    integer of a weight, or of each output channel's [G, O/G], `variance` v
    times the weights of a kernel.
    """

    importance: Tensor
    low: Tensor
    high: Tensor
    magnitudes: Tensor
    limit: Bits
    variance: float
    activation: str | None

    def __call__(self, divisors: Tensor) -> Tensor:
        return self.of_weights(divisors) + self.of_activations(divisors)

    def of_activations(self, divisors: Tensor) -> Tensor:
        """What rounding the divided inputs does."""
        if self.activation is None:
            return torch.zeros((), device=divisors.device)
        low, high = (self.low / divisors).amin(), (self.high / divisors).amax()
        step = (high - low if self.activation == "asymmetric" else 2 * torch.maximum(high, -low)) / LEVELS
        return step.square() / 12 * (self.importance * divisors.square()).sum()

    def of_weights(self, divisors: Tensor) -> Tensor:
        """What rounding the multiplied weights does."""
        groups, _, inputs = self.magnitudes.shape
        own = divisors.reshape(groups, inputs)
        steps = (self.magnitudes * own[:, None]).amax(dim=2) / self.limit
        return self.variance / 12 * (steps.square().sum(dim=1) * (1 / own.square()).sum(dim=1)).sum()
