"""What a change of each layer's weights does to the detections, to second order: the Hessians of GPTQ.

The network is walked once, block by block: a block's Hessians are summed while its input batches stream by. Two
passes over the pictures, one to look and one to go on, and one forward and backward pass for the importance of
positions, however many layers there are. Those of the float network are kept on disk (`curvature_cache`).

What is new here for detectors: the positions that a Hessian is made of are drawn by how much an error there reaches
the detections (`importance`), as nearly all of a picture is background.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quantrack.detector.blocks import Block, run_block
from quantrack.detector.heads import head_levels
from quantrack.progress import say, track
from quantrack.quantization.block_walk import BYTES_PER_GB, BlockWalk
from quantrack.quantization.importance import output_importance, with_covariance, without_covariance
from quantrack.quantization.input_columns import drawn_columns, input_columns, mean_column, output_size
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import QuantizedConvolution, layers_of_block, quantized_input, quantized_layers

CONSTANT = 1e-6  # share of inputs' power about their mean, below which it is nothing but float32's rounding
MOST_CATEGORIES = 2**24  # that torch.multinomial draws from; positions of larger inputs are drawn evenly


@dataclass(frozen=True)
class Sampling:
    """Which positions of which pictures Hessians are made of; as the settings of `Gptq`, which explains them."""

    positions: int
    importance_share: float
    weigh_all: bool
    mirrored: bool
    covariances: bool
    memory_gb: float

    def batches(self, job: QuantizationJob) -> Iterator[Tensor]:
        """The calibration inputs, each batch followed by its mirror image where that is asked for."""
        for batch in job.batches():
            yield batch
            if self.mirrored:
                yield batch.flip(-1)


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
        """As `inputs`, of the columns' differences from `mean`; zero in a group whose inputs are constant."""
        cross = self.drawn_mean[:, :, None] * self.mean[:, None, :]
        centred = self.inputs - cross - cross.transpose(1, 2) + self.mean[:, :, None] * self.mean[:, None, :]
        power, left = (of.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] for of in (self.inputs, centred))
        return torch.where(left > CONSTANT * power, centred, 0)

    def to(self, device: torch.device) -> Curvature:
        """The same on another device."""
        outputs = None if self.outputs is None else self.outputs.to(device)
        return Curvature(self.inputs.to(device), self.drawn_mean.to(device), self.mean.to(device), outputs)


Curvatures = Iterator[Mapping[str, Curvature]]


def curvatures_of(job: QuantizationJob, model: nn.Module, sampling: Sampling) -> Curvatures:
    """Curvatures by layer name, a few layers at a time in network order, of the inputs in `model`.

    That is the job's float network, or its own: of that layers are to be rounded before the next are asked for, as
    later ones see what they give. A Hessian takes 4 bytes * groups * (inputs per group)^2: a block is looked at as
    often as the memory needs.
    """
    positions = _Positions(sampling, job)
    with BlockWalk(model, sampling.batches(job), job.device, sampling.memory_gb) as walk:
        for block in track(walk.blocks, "GPTQ"):
            layers = layers_of_block(job.model, block)
            weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
            for names in layers_at_a_time(layers, sampling.memory_gb):
                with _unrounded(layers, weights):  # so that several looks give what one would
                    found = _collect(walk, block, names, positions)
                yield found
            walk.advance(block)


class _Positions:
    """Which output positions of a layer a Hessian is made of, and the gradients that say so."""

    def __init__(self, sampling: Sampling, job: QuantizationJob) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(job.seed)
        self.importance: list[dict[str, Tensor]] = []
        self.outputs: dict[str, Tensor] = {}
        wanted = sampling.importance_share > 0 or sampling.covariances
        if wanted and not head_levels(job.float_model):
            say("GPTQ: the model has no detection head that Quantrack knows; positions are drawn evenly")
        elif wanted:
            names = list(quantized_layers(job.model))
            count = job.batch_count * (2 if sampling.mirrored else 1)
            summarize = with_covariance if sampling.covariances else without_covariance
            for pictures in track(sampling.batches(job), "GPTQ: importance of positions", total=count):
                found = output_importance(job.float_model, names, pictures, self.generator, summarize)
                self.importance.append({name: of.positions.cpu() for name, of in found.items()})
                for name, of in found.items():
                    if of.covariance is not None:
                        self.outputs[name] = self.outputs.get(name, 0) + of.covariance

    def of(self, name: str, batch: int, x: Tensor, layer: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
        """The input columns [G, D, P] that count in one batch, and how much each does, 1 on average; None if alike."""
        available, count = len(x) * math.prod(output_size(x, layer)), self.sampling.positions
        if available <= count and not self.sampling.weigh_all:
            return input_columns(x, layer), None
        chances = self._chances(name, batch, available)
        if available <= count:
            return input_columns(x, layer), None if chances is None else available * chances.to(x.device)
        if chances is None:
            drawn = torch.randint(available, (count,), generator=self.generator)
        else:
            drawn = torch.multinomial(chances, count, replacement=True, generator=self.generator)
        return drawn_columns(x, layer, drawn.to(x.device)), None

    def _chances(self, name: str, batch: int, available: int) -> Tensor | None:
        """Of each output position of one batch to be drawn, in all 1; None where all have the same."""
        share = self.sampling.importance_share
        if not self.importance or share == 0 or available > MOST_CATEGORIES:
            return None
        found = self.importance[batch].get(name)  # None of what comes after the raw outputs, such as DFL
        total = 0.0 if found is None else float(found.sum())
        if found is None or total == 0:  # nothing that this layer does reaches a detection
            return None
        return share * found.flatten() / total + (1 - share) / available


class _Sums:
    """Of one layer's input columns over the batches, each picture counting alike; the last batch may be smaller."""

    def __init__(self) -> None:
        self.pictures = 0
        self.inputs = self.drawn_mean = self.mean = torch.zeros(())

    def add(self, pictures: int, columns: Tensor, weights: Tensor | None, mean: Tensor) -> None:
        """The columns [G, D, P] that were drawn from a batch, how much each counts, and the mean of all [G, D]."""
        weighed = columns if weights is None else columns * weights
        self.inputs = self.inputs + pictures * (weighed @ columns.transpose(1, 2) / columns.shape[2])
        self.drawn_mean = self.drawn_mean + pictures * weighed.mean(dim=2)
        self.mean = self.mean + pictures * mean
        self.pictures += pictures

    def curvature(self, outputs: Tensor | None) -> Curvature:
        """Of all that was added."""
        count = self.pictures
        return Curvature(self.inputs / count, self.drawn_mean / count, self.mean / count, outputs)


@torch.no_grad()
def _collect(walk: BlockWalk, block: Block, names: list[str], positions: _Positions) -> dict[str, Curvature]:
    """Of the named layers of one block, from one look at all of its input batches."""
    sums = {name: _Sums() for name in names}
    batch = 0  # of which the block is run; the hooks read it

    def collect(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        x = quantized_input(layer, inputs[0]) if isinstance(layer, QuantizedConvolution) else inputs[0]
        sums[name].add(len(x), *positions.of(name, batch, x, layer), mean_column(x, layer))

    with ExitStack() as hooks:
        for name in names:
            hook = partial(collect, name)
            hooks.enter_context(walk.model.get_submodule(name).register_forward_pre_hook(hook))
        for batch in range(walk.batch_count):
            run_block(walk.model, block, walk.inputs(block, batch))
    return {name: of.curvature(positions.outputs.get(name)) for name, of in sums.items() if of.pictures}


def layers_at_a_time(layers: Mapping[str, QuantizedConvolution], memory_gb: float) -> Iterator[list[str]]:
    """Layer names in order, as many at a time as the memory holds Hessians for."""
    names: list[str] = []
    used = 0.0
    for name, layer in layers.items():
        need = 4 * layer.groups * (layer.weight.numel() / layer.out_channels) ** 2 / BYTES_PER_GB
        if names and used + need > memory_gb:
            yield names
            names, used = [], 0.0
        names.append(name)
        used += need
    if names:
        yield names


@contextmanager
def _unrounded(layers: Mapping[str, QuantizedConvolution], weights: Mapping[str, Tensor]) -> Iterator[None]:
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
