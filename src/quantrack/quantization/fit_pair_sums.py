"""Step: weights whose products with bytes fit 16 bits two by two, so that integer kernels add exactly anywhere.

x86 processors with AVX2 and without VNNI multiply unsigned activations by signed weights and add two neighbouring
products in 16 bits, saturating (`vpmaddubsw`; ONNX Runtime's documentation of quantization, on U8S8).
They saturate where two large weights of one sign meet. The usual remedies are 7 bits for all weights
(`reduce_range`) and kernels that take half as much time again; with a scale that is a little larger neither is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    QuantizedConvolution,
    channel_bits,
    clamp_integers,
    fake_quantize,
    quantized_layers,
    set_weight_scale,
    shaped,
    weight_scale,
)
from quantrack.schemes import MAX_PAIR_SUM

SMALLEST_RAISE = 1.002


@dataclass(frozen=True)
class FitPairSums:
    """Raises the scale of each output channel in which two neighbours exceed `MAX_PAIR_SUM`, until none do.

    Half of the range always fits, so a channel loses less than a bit. Runs after what rounds weights, and before the
    bias correction. Depthwise convolutions have kernels of their own, which add in 32 bits.
    """

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        raised = [fit_pair_sums(layer) for layer in quantized_layers(job.model).values() if not is_depthwise(layer)]
        factors = torch.cat(raised) if raised else torch.ones(1)
        changed = factors[factors > 1]
        return {"channels": float(len(changed)), "scale_raised_mean": float(changed.mean()) if len(changed) else 1.0}


def fit_pair_sums(layer: QuantizedConvolution) -> Tensor:
    """Make one layer's weights fit, in place; by how much each channel's scale was raised, [O]."""
    bits, before = channel_bits(layer), weight_scale(layer)
    step = before.reshape(-1, 1, 1, 1)
    weight = clamp_integers(layer.weight.detach() / step, shaped(bits, -1, 1, 1, 1)) * step  # what was cut stays cut
    scale = before.clone()
    while True:  # ends: a channel whose scale has doubled has no weight beyond 64
        largest = largest_pair(fake_quantize(weight, scale, bits) / scale.reshape(-1, 1, 1, 1))
        exceeds = largest > MAX_PAIR_SUM
        if not exceeds.any():
            break
        scale = torch.where(exceeds, scale * (largest / MAX_PAIR_SUM).clamp_min(SMALLEST_RAISE), scale)
    rounded = fake_quantize(weight, scale, bits)
    layer.weight.data.copy_(torch.where((scale > before).reshape(-1, 1, 1, 1), rounded, layer.weight))
    set_weight_scale(layer, scale)
    return scale / before


def largest_pair(integers: Tensor) -> Tensor:
    """The largest sum of two neighbours of one sign among each output channel's weights [O, I/g, kh, kw], shape [O].

    Integer kernels take weights in channels-last order, so neighbours are the input channels 0 and 1, 2 and 3, ...
    at one place of the kernel. Of an odd number of channels the last has the next place's first for a neighbour, or,
    where channels are filled up to an even number, none.
    """
    in_order = integers.round().permute(0, 2, 3, 1)
    largest = _largest_of_two(in_order.flatten(1))
    if in_order.shape[-1] % 2:
        largest = torch.maximum(largest, _largest_of_two(functional.pad(in_order, (0, 1)).flatten(1)))
    return largest


def _largest_of_two(in_order: Tensor) -> Tensor:
    pairs = functional.pad(in_order, (0, in_order.shape[1] % 2)).reshape(len(in_order), -1, 2)
    return torch.maximum(pairs.clamp_min(0).sum(dim=2), (-pairs).clamp_min(0).sum(dim=2)).amax(dim=1)


def is_depthwise(layer: QuantizedConvolution) -> bool:
    """Whether each channel is convolved for itself."""
    return bool(layer.groups == layer.in_channels == layer.out_channels)
