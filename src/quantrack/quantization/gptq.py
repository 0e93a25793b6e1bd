"""Step: round weights one input column at a time, the rest making up for each error (GPTQ).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323), for convolutions of any grouping. The network is walked once, block by block:
a block's Hessians are summed while its input batches stream by, its weights are rounded, and the
blocks after it see what the rounded ones give. Two passes over the pictures in all, one to look and
one to go on, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import brevitas.nn as qnn
import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from quantrack.detector.blocks import Block, run_block
from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import track
from quantrack.quantization.block_walk import BYTES_PER_GB, BlockWalk
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    fake_quantize,
    layers_of_block,
    quantized_input,
    weight_bits,
    weight_limit,
    weight_scale,
)


@dataclass(frozen=True)
class Gptq:
    """Weights become points of their grid; scales stay as they were set.

    W8 modes are left to rounding to nearest, which loses nothing there that 100 pictures could show.

    A convolution sees `positions` output positions drawn from each batch. Hessians take 4 bytes *
    groups * (inputs per group)^2 a layer; a block's layers are worked off in as many looks at it as
    `memory_gb` needs (one each for YOLOv10). Block outputs take another `memory_gb`, then disk.
    """

    positions: int = 4096
    damping: float = 0.01
    block: int = 128
    memory_gb: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positions < 1 or self.block < 1 or not 0 < self.damping < 1 or self.memory_gb <= 0:
            raise UsageError("gptq: positions, block and memory_gb must be positive and damping in 0..1")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        if job.scheme.weight_bits >= 8:
            return {}
        before = after = 0.0
        generator = torch.Generator().manual_seed(self.seed)
        with BlockWalk(job.model, job.batches(), job.device, self.memory_gb) as walk:
            for block in track(walk.blocks, "GPTQ"):
                layers = layers_of_block(job.model, block)
                for names in self.chunks(layers):
                    for name, hessian in self.hessians(walk, block, layers, names, generator).items():
                        errors = self.round_layer(layers[name], hessian)
                        before, after = before + errors[0], after + errors[1]
                walk.advance(block)
        return {"error_before": before, "error_after": after}

    def round_layer(self, layer: qnn.QuantConv2d, hessian: Tensor) -> tuple[float, float]:
        """Round one layer's weights; the squared output error of rounding to nearest, and what is left."""
        bits, scale = weight_bits(layer), weight_scale(layer)
        weight = grouped(layer.weight.detach(), layer.groups)
        nearest = grouped(fake_quantize(layer.weight.detach(), scale, bits), layer.groups)
        rounded = self.round(weight, hessian, scale.reshape(layer.groups, -1), weight_limit(bits))
        errors = output_error(weight - nearest, hessian), output_error(weight - rounded, hessian)
        layer.weight.data.copy_(rounded.reshape(layer.weight.shape))
        return errors

    def chunks(self, layers: Mapping[str, qnn.QuantConv2d]) -> Iterator[list[str]]:
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

    @torch.no_grad()
    def hessians(
        self,
        walk: BlockWalk,
        block: Block,
        layers: Mapping[str, qnn.QuantConv2d],
        names: list[str],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Mean outer product of each layer's input columns, shape [groups, D, D] each.

        The inputs are the quantized prefix's; within the block weights are still float.
        """
        sums: dict[str, Tensor] = {}

        def collect(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, qnn.QuantConv2d)
            columns = sample_columns(quantized_input(module, inputs[0]), module, self.positions, generator)
            product = columns @ columns.transpose(1, 2) / columns.shape[2]
            sums[name] = sums[name] + product if name in sums else product

        handles = [
            layers[name].register_forward_pre_hook(lambda module, inputs, name=name: collect(name, module, inputs))
            for name in names
        ]
        try:
            with float_weights(layers):
                for batch in range(walk.batch_count):
                    run_block(walk.model, block, walk.inputs(block, batch))
        finally:
            for handle in handles:
                handle.remove()
        return {name: total / walk.batch_count for name, total in sums.items()}

    def round(self, weight: Tensor, hessian: Tensor, scale: Tensor, limit: int) -> Tensor:
        """Round weight [G, O/G, D] to its grid, columns of most input power first."""
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
        columns = order[:, None, :].expand_as(weight)
        rows = order[:, :, None].expand_as(hessian)
        sorted_hessian = hessian.gather(1, rows).gather(2, rows.transpose(1, 2))
        factor = inverse_factor(sorted_hessian, self.damping)
        rounded = self._round_sorted(weight.gather(2, columns), factor, scale, limit)
        return torch.empty_like(weight).scatter_(2, columns, rounded)

    def _round_sorted(self, weight: Tensor, factor: Tensor, scale: Tensor, limit: int) -> Tensor:
        rounded = torch.empty_like(weight)
        size = weight.shape[2]
        for start in range(0, size, self.block):
            stop = min(start + self.block, size)
            part, errors = weight[:, :, start:stop].clone(), torch.empty_like(weight[:, :, start:stop])
            own = factor[:, start:stop, start:stop]
            for i in range(stop - start):
                column = part[:, :, i]
                nearest = torch.clamp(torch.round(column / scale), -limit, limit) * scale
                rounded[:, :, start + i] = nearest
                error = (column - nearest) / own[:, i, i, None]
                part[:, :, i:] -= error[:, :, None] * own[:, None, i, i:]
                errors[:, :, i] = error
            weight[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
        return rounded


@contextmanager
def float_weights(layers: Mapping[str, qnn.QuantConv2d]) -> Iterator[None]:
    """Let layers compute with the weights they hold, not yet rounded."""
    try:
        for layer in layers.values():
            layer.weight_quant.disable_quant = True
        yield
    finally:
        for layer in layers.values():
            layer.weight_quant.disable_quant = False


def grouped(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight [O, I/G, kh, kw] as [G, O/G, D] with D = I/G * kh * kw."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def sample_columns(x: Tensor, layer: nn.Conv2d, positions: int, generator: torch.Generator) -> Tensor:
    """Input patches [G, D, P] at randomly drawn output positions of a batch [B, I, H, W]."""
    patches = unfold(x, layer.kernel_size, layer.dilation, _numeric(layer.padding), layer.stride)
    patches = patches.transpose(0, 1).reshape(layer.groups, -1, patches.shape[0] * patches.shape[2])
    if patches.shape[2] > positions:
        drawn = torch.randint(patches.shape[2], (positions,), generator=generator)
        patches = patches[:, :, drawn.to(x.device)]
    return patches


def _numeric(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(padding, str):
        raise QuantrackError(f"gptq: a convolution pads {padding!r}; only numeric padding is supported")
    return padding


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessians' inverse, shape [G, D, D]."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    # inputs that are always zero get a unit diagonal: their weights then round to nearest
    ridge = damping * diagonal.mean(dim=1, keepdim=True) + (diagonal.mean(dim=1, keepdim=True) == 0)
    damped = hessian + torch.diag_embed(ridge.expand_as(diagonal))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Mean squared change of the layer's output, summed over its channels."""
    return float(torch.einsum("god,gde,goe->", difference, hessian, difference))
