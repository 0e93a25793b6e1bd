"""Steps: one scale per output channel for the weights, by range or by least error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantrack.errors import UsageError
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    Bits,
    channel_bits,
    fake_quantize,
    quantized_layers,
    set_weight_scale,
    shaped,
    weight_limit,
    weight_range,
)

SMALLEST_SCALE = 1e-10


@dataclass(frozen=True)
class MinMaxWeightScales:
    """The largest weight of each output channel becomes the largest integer."""

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        for layer in quantized_layers(job.model).values():
            set_weight_scale(layer, min_max_scale(layer.weight, channel_bits(layer)))
        return {}


@dataclass(frozen=True)
class PercentileWeightScales:
    """A high percentile (in percent) of each output channel's magnitudes becomes the largest integer."""

    percentile: float = 99.0

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise UsageError(f"percentile={self.percentile}: must lie in 0..100")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        for layer in quantized_layers(job.model).values():
            limit = weight_limit(channel_bits(layer))
            magnitudes = layer.weight.detach().abs().flatten(1)
            set_weight_scale(
                layer, (magnitudes.quantile(self.percentile / 100, dim=1) / limit).clamp_min(SMALLEST_SCALE)
            )
        return {}


@dataclass(frozen=True)
class MseWeightScales:
    """The scale of least squared rounding error, searched over shrunken ranges.

    Weighting the errors by each input channel's power was tried: better before GPTQ, worse after it.
    """

    candidates: int = 80
    smallest_shrink: float = 0.35

    def __post_init__(self) -> None:
        if self.candidates < 2 or not 0 < self.smallest_shrink < 1:
            raise UsageError("mse weight scales: candidates must be at least 2 and smallest_shrink in 0..1")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        before = after = 0.0
        for layer in quantized_layers(job.model).values():
            bits, weight = channel_bits(layer), layer.weight.detach()
            start = min_max_scale(weight, bits)
            best = self.search(weight, start, bits)
            set_weight_scale(layer, best)
            before += float(channel_error(weight, start, bits).sum())
            after += float(channel_error(weight, best, bits).sum())
        return {"error_before": before, "error_after": after}

    def search(self, weight: Tensor, start: Tensor, bits: Bits) -> Tensor:
        """The best of `candidates` shrunken scales for each output channel, shape [O]."""
        units = weight.flatten(1) / start[:, None]
        lowest, highest = (torch.as_tensor(end).to(units) for end in weight_range(shaped(bits, -1, 1)))
        rounded = torch.empty_like(units)  # one buffer for all candidates
        best, least = torch.ones_like(start), torch.full_like(start, torch.inf)
        for shrink in [1.0, *torch.linspace(self.smallest_shrink, 1.0, self.candidates).tolist()]:
            torch.div(units, shrink, out=rounded).round_()
            torch.maximum(torch.minimum(rounded, highest, out=rounded), lowest, out=rounded)
            error = rounded.mul_(shrink).sub_(units).square_().sum(dim=1)
            best = torch.where(error < least, shrink, best)
            least = torch.minimum(error, least)
        return start * best


def min_max_scale(weight: Tensor, bits: Bits) -> Tensor:
    """Largest magnitude of each output channel over the largest integer, shape [O]."""
    return (weight.detach().abs().flatten(1).amax(dim=1) / weight_limit(bits)).clamp_min(SMALLEST_SCALE)


def channel_error(weight: Tensor, scale: Tensor, bits: Bits) -> Tensor:
    """Squared rounding error of each output channel, shape [O]."""
    return (fake_quantize(weight, scale, bits) - weight).square().flatten(1).sum(dim=1)
