"""Step: round weights one input column at a time, the rest making up for each error (GPTQ).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323), for convolutions of any grouping. The network is walked once, block by block: a
block's Hessians are summed while its input batches stream by, its weights are rounded, and the walk
goes on. Two passes over the pictures, one to look and one to go on, and one forward and backward
pass for the importance of positions, however many layers there are.

What is new here for detectors: the positions that a Hessian is made of are drawn by how much an error
there reaches the detections (`importance`), as nearly all of a picture is background. Where asked
(`output_sweeps`), output channels make up for errors of others that move the detections the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantrack.detector.blocks import Block, run_block
from quantrack.detector.heads import head_levels
from quantrack.errors import UsageError
from quantrack.progress import track
from quantrack.quantization.block_walk import BYTES_PER_GB, BlockWalk
from quantrack.quantization.coordinate_descent import (
    channel_errors,
    damped,
    refined,
    refined_jointly,
    restoring_gain,
    towards_diagonal,
)
from quantrack.quantization.importance import output_importance, with_covariance, without_covariance
from quantrack.quantization.input_columns import drawn_columns, input_columns, mean_column, output_size
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    Bits,
    QuantizedConvolution,
    channel_bits,
    clamp_integers,
    fake_quantize,
    layers_of_block,
    quantized_input,
    quantized_layers,
    set_weight_scale,
    shaped,
    weight_scale,
)

INPUTS = ("float", "quantized")


@dataclass(frozen=True)
class Gptq:
    """Weights become points of their grid, which each output channel chooses: of its scale times each
    of `scale_factors`, the one that leaves the least error after rounding. `sweeps` of coordinate
    descent then lessen the error of each output channel further, and `output_sweeps` that of all
    channels together, whose covariances count by `output_share`.

    The scale of least error makes a layer's answer to its input a little too small. With `unshrunken` the scale
    is raised until the answer is as large as before: noise of many layers adds up by its variance, shrinking by
    its amount, and objects would lose confidence.

    With `centred`, inputs are taken as differences from their mean: what a change of weights does to the
    mean is left to the bias correction that must follow.

    A convolution sees `positions` output positions drawn from each batch: `importance_share` of the
    probability by importance, the rest evenly. `inputs` are the float network's, or what the quantized
    blocks before give. With `mirrored` each picture is seen mirrored as well. Where all positions count
    alike (an `importance_share` and `output_sweeps` of 0), no gradients are taken.

    Hessians take 4 bytes * groups * (inputs per group)^2 a layer; a block's layers are worked off in as
    many looks at it as `memory_gb` needs (one each for YOLOv10). Block outputs take another `memory_gb`,
    then disk; importance 4 bytes for each position of each layer.
    """

    positions: int = 4096
    importance_share: float = 0.7
    inputs: str = "float"
    mirrored: bool = False
    centred: bool = True
    scale_factors: tuple[float, ...] = (0.8, 0.87, 0.94, 1.0, 1.07, 1.15)
    sweeps: int = 3
    output_sweeps: int = 0
    output_share: float = 0.9
    unshrunken: bool = True
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
        for curvatures in self.curvatures(job, job.float_model if self.inputs == "float" else job.model):
            for name, curvature in curvatures.items():
                errors = self.round_layer(layers[name], curvature)
                before, after = before + errors[0], after + errors[1]
        return {"error_before": before, "error_after": after}

    def batches(self, job: QuantizationJob) -> Iterator[Tensor]:
        """The calibration inputs, each batch followed by its mirror image where that is asked for."""
        for batch in job.batches():
            yield batch
            if self.mirrored:
                yield batch.flip(-1)

    def curvatures(self, job: QuantizationJob, seen: nn.Module) -> Iterator[Mapping[str, Curvature]]:
        """Curvatures by layer name, a few layers at a time in network order, of the inputs in `seen`.

        `seen` is the float model or the job's own; layers of the latter are to be rounded before the
        next are asked for, as later ones see what they give.
        """
        positions = _Positions(self, job)
        with BlockWalk(seen, self.batches(job), job.device, self.memory_gb) as walk:
            for block in track(walk.blocks, "GPTQ"):
                layers = layers_of_block(job.model, block)
                weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
                for names in self.chunks(layers):
                    with unrounded(layers, weights):  # so that several looks give what one would
                        curvatures = collect_curvatures(walk, block, names, positions)
                    yield curvatures
                walk.advance(block)

    def round_layer(self, layer: QuantizedConvolution, curvature: Curvature) -> tuple[float, float]:
        """Round one layer's weights; the squared output error of rounding to nearest, and what is left."""
        bits, scale = shaped(channel_bits(layer), layer.groups, -1), weight_scale(layer)
        hessian = as_equalized(curvature.centred if self.centred else curvature.inputs, layer)
        weight = grouped(layer.weight.detach(), layer.groups)
        nearest = grouped(fake_quantize(layer.weight.detach(), scale, channel_bits(layer)), layer.groups)
        factors = torch.tensor(self.scale_factors, device=weight.device).repeat_interleave(weight.shape[1])
        scales = scale.reshape(layer.groups, -1).repeat(1, len(self.scale_factors)) * factors
        trials = weight.repeat(1, len(self.scale_factors), 1)
        of_trials = bits.repeat(1, len(self.scale_factors)) if isinstance(bits, Tensor) else bits
        rounded = self.round(trials, hessian, scales, of_trials)
        rounded, chosen = best_of_each(rounded, scales, channel_errors(trials - rounded, hessian), weight.shape[1])
        firm = damped(hessian, self.damping)
        for _ in range(self.sweeps):
            rounded, chosen = refined(weight, rounded, chosen, firm, bits)
        if curvature.outputs is not None and layer.groups == 1:
            outputs = towards_diagonal(curvature.outputs, self.output_share)
            for _ in range(self.output_sweeps):
                rounded = refined_jointly(weight[0], rounded[0], chosen[0], firm[0], outputs, shaped(bits, -1))[None]
        if self.unshrunken:
            gain = restoring_gain(weight, rounded, hessian)
            rounded, chosen = rounded * gain[:, :, None], chosen * gain
        errors = channel_errors(weight - nearest, hessian).sum(), channel_errors(weight - rounded, hessian).sum()
        set_weight_scale(layer, chosen.flatten())
        layer.weight.data.copy_(rounded.reshape(layer.weight.shape))
        return float(errors[0]), float(errors[1])

    def chunks(self, layers: Mapping[str, QuantizedConvolution]) -> Iterator[list[str]]:
        """Layer names in order, as many at a time as the memory holds Hessians for."""
        names: list[str] = []
        used = 0.0
        for name, layer in layers.items():
            need = 4 * layer.groups * (layer.weight.numel() / layer.out_channels) ** 2 / BYTES_PER_GB
            if names and used + need > self.memory_gb:
                yield names
                names, used = [], 0.0
            names.append(name)
            used += need
        if names:
            yield names

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
        rounded = torch.empty_like(weight)
        size = weight.shape[2]
        for start in range(0, size, self.block):
            stop = min(start + self.block, size)
            part, errors = weight[:, :, start:stop].clone(), torch.empty_like(weight[:, :, start:stop])
            own = factor[:, start:stop, start:stop]
            for i in range(stop - start):
                column = part[:, :, i]
                nearest = clamp_integers(torch.round(column / scale), bits) * scale
                rounded[:, :, start + i] = nearest
                error = (column - nearest) / own[:, i, i, None]
                part[:, :, i:] -= error[:, :, None] * own[:, None, i, i:]
                errors[:, :, i] = error
            weight[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
        return rounded


@dataclass(frozen=True)
class Curvature:
    """What a change of one layer's weights does to the detections, to second order, up to a factor.

    `inputs` [G, D, D] is the mean outer product of input columns at the drawn positions, `drawn_mean` and
    `mean` [G, D] their mean there and at all positions. `outputs` [O, O] is the covariance of the gradients
    of the layer's outputs; None where it is not asked for.
    """

    inputs: Tensor
    drawn_mean: Tensor
    mean: Tensor
    outputs: Tensor | None

    @property
    def centred(self) -> Tensor:
        """As `inputs`, of the columns' differences from `mean`."""
        cross = self.drawn_mean[:, :, None] * self.mean[:, None, :]
        return self.inputs - cross - cross.transpose(1, 2) + self.mean[:, :, None] * self.mean[:, None, :]


class _Positions:
    """Which output positions of a layer a Hessian is made of, and the gradients that say so."""

    def __init__(self, settings: Gptq, job: QuantizationJob) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(job.seed)
        self.importance: list[dict[str, Tensor]] = []
        self.outputs: dict[str, Tensor] = {}
        if (settings.importance_share > 0 or settings.output_sweeps > 0) and head_levels(job.float_model):
            names = list(quantized_layers(job.model))
            count = job.batch_count * (2 if settings.mirrored else 1)
            seen = with_covariance if settings.output_sweeps > 0 else without_covariance
            for pictures in track(settings.batches(job), "GPTQ: importance of positions", total=count):
                found = output_importance(job.float_model, names, pictures, self.generator, seen)
                self.importance.append({name: of.positions.cpu() for name, of in found.items()})
                for name, of in found.items():
                    if of.covariance is not None:
                        self.outputs[name] = self.outputs.get(name, 0) + of.covariance

    def drawn(self, name: str, batch: int, available: int) -> Tensor | None:
        """Indices of positions of one batch, with repetition; None for all of them."""
        count = self.settings.positions
        if available <= count:
            return None
        if not self.importance or self.settings.importance_share == 0:
            return torch.randint(available, (count,), generator=self.generator)
        share = self.settings.importance_share
        importance = self.importance[batch][name].flatten()
        total = float(importance.sum())
        if total == 0:  # nothing that this layer does reaches a detection
            return torch.randint(available, (count,), generator=self.generator)
        chances = share * importance / total + (1 - share) / available
        return torch.multinomial(chances, count, replacement=True, generator=self.generator)


@torch.no_grad()
def collect_curvatures(walk: BlockWalk, block: Block, names: list[str], positions: _Positions) -> dict[str, Curvature]:
    """Of the named layers of one block, from one look at all of its input batches."""
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    current = 0

    def collect(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        x = quantized_input(layer, inputs[0]) if isinstance(layer, QuantizedConvolution) else inputs[0]
        drawn = positions.drawn(name, current, len(x) * math.prod(output_size(x, layer)))
        columns = input_columns(x, layer) if drawn is None else drawn_columns(x, layer, drawn.to(x.device))
        seen = columns @ columns.transpose(1, 2) / columns.shape[2], columns.mean(dim=2), mean_column(x, layer)
        before = sums.get(name)
        sums[name] = seen if before is None else (before[0] + seen[0], before[1] + seen[1], before[2] + seen[2])

    handles = [
        walk.model.get_submodule(name).register_forward_pre_hook(
            lambda layer, inputs, name=name: collect(name, layer, inputs)
        )
        for name in names
    ]
    try:
        for current in range(walk.batch_count):
            run_block(walk.model, block, walk.inputs(block, current))
    finally:
        for handle in handles:
            handle.remove()
    count = walk.batch_count
    return {
        name: Curvature(inputs / count, drawn_mean / count, mean / count, positions.outputs.get(name))
        for name, (inputs, drawn_mean, mean) in sums.items()
    }


@contextmanager
def unrounded(layers: Mapping[str, QuantizedConvolution], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers compute with these weights as they are, for a while."""
    own = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data = weights[name]
            layer.weight_quant.disable_quant = True
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = own[name]
            layer.weight_quant.disable_quant = False


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
    """Upper Cholesky factor of the damped Hessians' inverse, shape [G, D, D]."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damping)))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def best_of_each(rounded: Tensor, scales: Tensor, errors: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Of each channel's trials, the weight and the scale of least error.

    Trials lie one after the other: weights [G, T * channels, D], scales and errors [G, T * channels].
    """
    groups, _, size = rounded.shape
    best = errors.reshape(groups, -1, channels).argmin(dim=1)
    index = best * channels + torch.arange(channels, device=best.device)
    return rounded.gather(1, index[:, :, None].expand(groups, channels, size)), scales.gather(1, index)
