"""Step: round weights one input column at a time, the rest making up for each error (GPTQ).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323), for convolutions of any grouping. The Hessians of all layers come from one pass
over the calibration pictures, so the cost is linear in them: a convolution sees a fixed number of
randomly drawn positions of each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import brevitas.nn as qnn
import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import track
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    fake_quantize,
    quantized_layers,
    weight_bits,
    weight_limit,
    weight_scale,
)

BYTES_PER_GB = 1e9


@dataclass(frozen=True)
class Gptq:
    """Weights become points of their grid; scales stay as they were set.

    W8 modes are left to rounding to nearest, which loses nothing there that 100 pictures could show.

    `positions` are drawn per batch and layer. Hessians take 4 bytes * groups * (inputs per group)^2
    a layer; layers are worked off in as many passes as `memory_gb` needs (one for YOLOv10n).
    """

    positions: int = 4096
    damping: float = 0.01
    block: int = 128
    memory_gb: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positions < 1 or self.block < 1 or not 0 < self.damping < 1 or self.memory_gb <= 0:
            raise UsageError("gptq: positions, block and memory_gb must be positive and damping in 0..1")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        before = after = 0.0
        passes = 0
        layers = quantized_layers(job.model) if job.scheme.weight_bits < 8 else {}
        for names in self.chunks(layers):
            passes += 1
            for name, hessian in self.hessians(job, names).items():
                layer = layers[name]
                bits, scale = weight_bits(layer), weight_scale(layer)
                weight = grouped(layer.weight.detach(), layer.groups)
                nearest = grouped(fake_quantize(layer.weight.detach(), scale, bits), layer.groups)
                rounded = self.round(weight, hessian, scale.reshape(layer.groups, -1), weight_limit(bits))
                before += output_error(weight - nearest, hessian)
                after += output_error(weight - rounded, hessian)
                layer.weight.data.copy_(rounded.reshape(layer.weight.shape))
        return {"passes": float(passes), "error_before": before, "error_after": after}

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

    def hessians(self, job: QuantizationJob, names: list[str]) -> dict[str, Tensor]:
        """Mean outer product of each layer's float input columns, shape [groups, D, D] each."""
        sums: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(self.seed)

        def collect(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Conv2d)
            columns = sample_columns(inputs[0], module, self.positions, generator)
            product = columns @ columns.transpose(1, 2) / columns.shape[2]
            sums[name] = sums[name] + product if name in sums else product

        handles = [
            job.float_model.get_submodule(name).register_forward_pre_hook(
                lambda module, inputs, name=name: collect(name, module, inputs)
            )
            for name in names
        ]
        try:
            with torch.no_grad():
                for batch in track(job.batches(), "GPTQ: collecting Hessians", total=job.batch_count):
                    job.float_model(batch)
        finally:
            for handle in handles:
                handle.remove()
        return {name: total / job.batch_count for name, total in sums.items()}

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
