"""What each layer's rounding alone does to the detector's outputs, estimated from gradients.

One backward pass a picture gives it for all layers and numbers of bits at once, where trying each of
them on as many pictures would take hours: to first order a change of weights moves an output by its
product with the output's gradient. As in `importance`, outputs are randomly projected, so that the
mean square over pictures and projections estimates the squared error of objects' logits and boxes (the
Gauss-Newton approximation; Dong et al., "HAWQ-V2", arXiv:1911.03852, go by the mean of the same matrix's diagonal).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantrack.detector.heads import raw_outputs
from quantrack.progress import track
from quantrack.quantization.importance import random_projection
from quantrack.quantization.job import QuantizationJob

PROJECTIONS = 2  # of each picture's outputs


@dataclass(frozen=True)
class LayerChange:
    """What rounding does to one convolution: to its weights, and thereby to its mean outputs [O]."""

    weight: Tensor
    mean_output: Tensor


Changes = Mapping[str, Mapping[int, LayerChange]]


@dataclass(frozen=True)
class ChangeErrors:
    """The estimated error of one change: of the whole layer's, and of each output channel's alone."""

    layer: float
    channels: tuple[float, ...]


def gradient_errors(job: QuantizationJob, changes: Changes) -> dict[str, dict[int, ChangeErrors]]:
    """The estimated error of each change, by layer name and bits, over the job's pictures.

    Mean outputs count as restored, as bias correction will. Pictures count less as their gradients are
    larger than usual, so that none decides alone.
    """
    effects: dict[str, dict[int, list[Tensor]]] = {
        name: {bits: [] for bits in tried} for name, tried in changes.items()
    }
    norms: dict[str, list[float]] = {name: [] for name in changes}
    for name, weight, bias in _gradients(job, list(changes)):
        norms[name].append(float(weight.square().sum()))
        for bits, change in changes[name].items():
            effects[name][bits].append((weight * change.weight).flatten(1).sum(dim=1) - bias * change.mean_output)
    trust = _trust(torch.tensor(list(norms.values()), dtype=torch.float64))
    return {
        name: {bits: _mean_square(torch.stack(seen).double().cpu(), trust) for bits, seen in of.items()}
        for name, of in effects.items()
    }


def _mean_square(effects: Tensor, trust: Tensor) -> ChangeErrors:
    """Of effects [projections, O] that count by `trust` [projections]."""
    whole = (trust * effects.sum(dim=1).square()).mean()
    channels = (trust[:, None] * effects.square()).mean(dim=0)
    return ChangeErrors(float(whole), tuple(channels.tolist()))


def _trust(norms: Tensor) -> Tensor:
    """The weight of each projection, from its squared gradient norms, shape [layers, projections].

    Layers that most projections do not reach say nothing about which are large.

    >>> _trust(torch.tensor([[1.0, 1.0, 3.0], [0.0, 0.0, 1e-3]]))
    tensor([0.5000, 0.5000, 0.2500])
    """
    usual = norms.median(dim=1, keepdim=True).values
    reached = usual[:, 0] > 0
    if not reached.any():
        return torch.ones_like(norms[0])
    size = (norms[reached] / usual[reached]).mean(dim=0)
    return 1 / (1 + size / size.median())


def _gradients(job: QuantizationJob, names: list[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, and its weight's and bias' gradients, for each projection of each picture's outputs in turn."""
    probe = copy.deepcopy(job.float_model)
    layers = [probe.get_submodule(name) for name in names]
    parameters = [_differentiable(layer) for layer in layers]
    single = replace(job, batch=1)
    generator = torch.Generator().manual_seed(job.seed)
    with raw_outputs(probe) as tap:
        for picture in track(single.batches(), "sensitivity", total=single.batch_count):
            with torch.enable_grad():
                probe(picture)
                outputs = tap.taken()
                for left in reversed(range(PROJECTIONS)):
                    flat = [parameter for pair in parameters for parameter in pair]
                    projection = random_projection(outputs, generator)
                    found = torch.autograd.grad(projection, flat, retain_graph=left > 0)
                    yield from zip(names, found[::2], found[1::2], strict=True)


def _differentiable(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias, made ready for gradients; the bias is made where there is none."""
    assert isinstance(layer, nn.Conv2d)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels, device=layer.weight.device))
    return layer.weight.requires_grad_(), layer.bias.requires_grad_()
