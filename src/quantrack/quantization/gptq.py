"""Step: round weights one input column at a time, the rest making up for each error (GPTQ).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323), for convolutions of any grouping, by the Hessians of `curvature`: one walk through the
network, whatever the mode. Where asked (`output_sweeps`), output channels make up for errors of others that
move the detections the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantrack.errors import QuantrackError, UsageError
from quantrack.quantization.coordinate_descent import (
    channel_errors,
    damped,
    refined,
    refined_jointly,
    restoring_gain,
    towards_diagonal,
)
from quantrack.quantization.curvature import Curvature, Curvatures, Sampling, curvatures_of
from quantrack.quantization.curvature_cache import float_curvatures
from quantrack.quantization.fit_pair_sums import SMALLEST_RAISE, is_depthwise, largest_pair
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    Bits,
    QuantizedConvolution,
    channel_bits,
    fake_quantize,
    quantized_layers,
    set_weight_scale,
    shaped,
    weight_range,
    weight_scale,
)
from quantrack.schemes import MAX_PAIR_SUM

INPUTS = ("float", "quantized")
FIT_TRIALS = 8


@dataclass(frozen=True)
class Gptq:
    """GPTQ with scales chosen by output channel, then coordinate descent.

    Of its scale times each of `scale_factors`, an output channel takes the one that leaves the least error after
    rounding. `sweeps` of coordinate descent then reduce the error of each output channel further, and `output_sweeps`
    that of all channels together, whose covariances count by `output_share`.

    The scale of least error makes a layer's response to its input a little too weak. With `unshrunken` the scale is
    raised until the response is as strong as before: rounding noise of many layers adds up in variance, but this
    attenuation compounds from layer to layer, and objects would lose confidence.

    With `fit_pairs`, channels of 8 bits are rounded again at larger scales where two neighbours exceed what integer
    kernels add exactly; `fit_pair_sums` after it sees to what is left after `FIT_TRIALS`.

    With `centred`, inputs are taken as differences from their mean: what a change of weights does to the
    mean is left to the bias correction that must follow.

    A convolution sees `positions` output positions drawn from each batch: `importance_share` of the
    probability by importance, the rest evenly. Where it has no more of them than that it sees all, alike or, with
    `weigh_all`, as much as they would be drawn: better where whole layers have few bits (benchmarks/decisions.md).
    `inputs` are the float network's, or what the quantized blocks before give. With `mirrored` each picture is seen
    mirrored as well. Where all positions count alike (an `importance_share` and `output_sweeps` of 0), no gradients
    are taken.

    Hessians take 4 bytes * groups * (inputs per group)^2 a layer, of as many layers of a block at a time as
    `memory_gb` holds (all, for YOLOv10). Block outputs take another `memory_gb`, then disk; importance 4 bytes
    for each position of each layer. Of the float network they are kept in the cache: 67 MB for YOLOv10n, 431 MB
    for YOLOv10m, and with `output_sweeps` 4 bytes * (output channels)^2 a layer more.
    """

    positions: int = 4096
    importance_share: float = 0.7
    weigh_all: bool = False
    inputs: str = "float"
    mirrored: bool = False
    centred: bool = True
    scale_factors: tuple[float, ...] = (0.8, 0.87, 0.94, 1.0, 1.07, 1.15)
    sweeps: int = 3
    output_sweeps: int = 0
    output_share: float = 0.9
    unshrunken: bool = True
    fit_pairs: bool = False
    damping: float = 0.01
    block: int = 128
    memory_gb: float = 0.75

    def __post_init__(self) -> None:
        if self.positions < 1 or self.block < 1 or not 0 < self.damping < 1 or self.memory_gb <= 0:
            raise UsageError("gptq: positions, block and memory_gb must be positive and damping in 0..1")
        if not self.scale_factors or min(self.scale_factors) <= 0 or min(self.sweeps, self.output_sweeps) < 0:
            raise UsageError(
                "gptq: scale_factors must be positive, at least one, and sweeps and output_sweeps not negative"
            )
        if not 0 <= self.output_share < 1:
            raise UsageError("gptq: output_share must be at least 0 and less than 1")
        if not 0 <= self.importance_share <= 1 or self.inputs not in INPUTS:
            raise UsageError(f"gptq: importance_share must lie in 0..1 and inputs be {' or '.join(INPUTS)}")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        before = after = 0.0
        layers = quantized_layers(job.model)
        for by_name in self.curvatures(job):
            for name, curvature in by_name.items():
                errors = self.round_layer(layers[name], curvature)
                before, after = before + errors[0], after + errors[1]
        return {"error_before": before, "error_after": after}

    def curvatures(self, job: QuantizationJob) -> Curvatures:
        """Of the network that the inputs are taken from."""
        if self.inputs == "float":
            return float_curvatures(job, self.sampling)
        return curvatures_of(job, job.model, self.sampling)

    @property
    def sampling(self) -> Sampling:
        """What these settings say of the Hessians."""
        share, across = self.importance_share, self.output_sweeps > 0
        return Sampling(self.positions, share, self.weigh_all, self.mirrored, across, self.memory_gb)

    def round_layer(self, layer: QuantizedConvolution, curvature: Curvature) -> tuple[float, float]:
        """Round one layer's weights; the squared output error of rounding to nearest, and what is left."""
        bits, scale = shaped(channel_bits(layer), layer.groups, -1), weight_scale(layer)
        hessian = as_equalized(curvature.centred if self.centred else curvature.inputs, layer)
        weight = grouped(layer.weight.detach(), layer.groups)
        nearest = grouped(fake_quantize(layer.weight.detach(), scale, channel_bits(layer)), layer.groups)
        outputs = curvature.outputs if layer.groups == 1 else None
        rounded, chosen = self.rounded(weight, scale.reshape(layer.groups, -1), bits, hessian, outputs)
        if self.fit_pairs and not is_depthwise(layer):
            rounded, chosen = self.fitted(weight, rounded, chosen, bits, hessian, layer.weight.shape)
        errors = channel_errors(weight - nearest, hessian).sum(), channel_errors(weight - rounded, hessian).sum()
        set_weight_scale(layer, chosen.flatten())
        layer.weight.data.copy_(rounded.reshape(layer.weight.shape))
        return float(errors[0]), float(errors[1])

    def rounded(
        self, weight: Tensor, scale: Tensor, bits: Bits, hessian: Tensor, outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights [G, O/G, D] on grids of so many bits (each channel's own, [G, O/G]), and their scales [G, O/G].

        `scale` is where the choice of scales starts from. Without the covariance of `outputs` [O, O], of one group,
        each output channel is rounded for itself.
        """
        count = len(self.scale_factors)
        factors = torch.tensor(self.scale_factors, device=weight.device).repeat_interleave(weight.shape[1])
        scales, trials = scale.repeat(1, count) * factors, weight.repeat(1, count, 1)
        rounded = self.round(trials, hessian, scales, bits.repeat(1, count) if isinstance(bits, Tensor) else bits)
        rounded, chosen = best_of_each(rounded, scales, channel_errors(trials - rounded, hessian), weight.shape[1])
        firm = damped(hessian, self.damping)
        for _ in range(self.sweeps):
            rounded, chosen = refined(weight, rounded, chosen, firm, bits)
        if outputs is not None:
            across = towards_diagonal(outputs, self.output_share)
            for _ in range(self.output_sweeps):
                rounded = refined_jointly(weight[0], rounded[0], chosen[0], firm[0], across, shaped(bits, -1))[None]
        if self.unshrunken:
            gain = restoring_gain(weight, rounded, hessian)
            rounded, chosen = rounded * gain[:, :, None], chosen * gain
        return rounded, chosen

    def fitted(
        self, weight: Tensor, rounded: Tensor, chosen: Tensor, bits: Bits, hessian: Tensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Rounded weights and scales, channels with neighbours that exceed `MAX_PAIR_SUM` anew at larger scales.

        Each of these is rounded for itself. `shape` is that of the convolution's weight.
        """
        at_one_scale, start = replace(self, scale_factors=(1.0,)), chosen
        lowest, highest = ((chosen * limit)[:, :, None] for limit in weight_range(bits))
        weight = torch.maximum(torch.minimum(weight, highest), lowest)  # what was cut stays cut
        for _ in range(FIT_TRIALS):
            largest = largest_pair((rounded / chosen[:, :, None]).reshape(shape)).reshape(chosen.shape)
            exceeds = largest > MAX_PAIR_SUM
            if not exceeds.any():
                break
            start = torch.where(exceeds, start * SMALLEST_RAISE * largest / MAX_PAIR_SUM, start)
            again, scales = at_one_scale.rounded(weight, start, bits, hessian)
            rounded = torch.where(exceeds[:, :, None], again, rounded)
            chosen = torch.where(exceeds, scales, chosen)
        return rounded, chosen

    def round(self, weight: Tensor, hessian: Tensor, scale: Tensor, bits: Bits) -> Tensor:
        """Round weight [G, O/G, D] to its grid, columns of most input power first."""
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
        columns = order[:, None, :].expand_as(weight)
        rows = order[:, :, None].expand_as(hessian)
        sorted_hessian = hessian.gather(1, rows).gather(2, rows.transpose(1, 2))
        factor = inverse_factor(sorted_hessian, self.damping)
        rounded = self._round_sorted(weight.gather(2, columns), factor, scale, bits)
        return torch.empty_like(weight).scatter_(2, columns, rounded)

    def _round_sorted(self, weight: Tensor, factor: Tensor, scale: Tensor, bits: Bits) -> Tensor:
        """Round columns of [G, O/G, D] from first to last.

        What the columns before leave a column to make up for is summed when its turn comes, a block of them is
        passed on to all later ones at once, and a column's weights lie together: several times faster than
        bringing all later columns up to date after each.
        """
        weight = weight.transpose(1, 2).contiguous()  # in its place, as the largest layers leave little memory
        rounded = torch.empty_like(weight)
        lowest, highest = (torch.as_tensor(end).to(weight) for end in weight_range(bits))
        for start in range(0, weight.shape[1], self.block):
            stop = min(start + self.block, weight.shape[1])
            own, later = factor[:, start:stop, start:stop], factor[:, start:stop, stop:]
            errors = torch.empty_like(weight[:, start:stop])
            for i in range(stop - start):
                so_far = own[:, None, :i, i] @ errors[:, :i]
                column = weight[:, start + i] - so_far.squeeze(1)
                # in half the time of torch.clamp with tensors
                nearest = torch.maximum(torch.minimum(torch.round(column / scale), highest), lowest) * scale
                rounded[:, start + i] = nearest
                errors[:, i] = (column - nearest) / own[:, i, i, None]
            weight[:, stop:].baddbmm_(later.transpose(1, 2), errors, alpha=-1)
        return rounded.transpose(1, 2)


def grouped(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight [O, I/G, kh, kw] as [G, O/G, D] with D = I/G * kh * kw."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def as_equalized(hessian: Tensor, layer: QuantizedConvolution) -> Tensor:
    """A Hessian [G, D, D] of a convolution's input, after the layer has equalized its channels."""
    if layer.input_scale is None:
        return hessian
    kernel = layer.weight.shape[2] * layer.weight.shape[3]
    factors = layer.input_scale.reshape(layer.groups, -1).repeat_interleave(kernel, dim=1)
    return hessian * factors[:, :, None] * factors[:, None, :]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessians' inverse, shape [G, D, D].

    Where float32 cannot tell them from singular ones, they are damped ten times as much, as often as needed.
    """
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed.any():
            factor: Tensor
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any():
                return factor
        if not hessian.isfinite().all():
            raise QuantrackError("gptq: inputs of a convolution are not finite on the calibration pictures")
        damping *= 10


def best_of_each(rounded: Tensor, scales: Tensor, errors: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Of each channel's trials, the weight and the scale of least error.

    Trials lie one after the other: weights [G, T * channels, D], scales and errors [G, T * channels].
    """
    groups, _, size = rounded.shape
    best = errors.reshape(groups, -1, channels).argmin(dim=1)
    index = best * channels + torch.arange(channels, device=best.device)
    return rounded.gather(1, index[:, :, None].expand(groups, channels, size)), scales.gather(1, index)
