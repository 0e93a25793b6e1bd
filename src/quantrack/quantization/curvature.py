"""What a change of each layer's weights does to the detections, to second order: the Hessians of GPTQ.

The network is walked once, block by block: a block's Hessians are summed while its input batches stream by. Two
passes over the pictures, one to look and one to go on, and one forward and backward pass for the importance of
positions, however many layers there are. Those of the float network are kept on disk, for all modes and bit plans.

What is new here for detectors: the positions that a Hessian is made of are drawn by how much an error there reaches
the detections (`importance`), as nearly all of a picture is background.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from quantrack.detector.blocks import Block, run_block
from quantrack.detector.heads import head_levels
from quantrack.errors import memory_problem
from quantrack.files import atomic_folder, write_json
from quantrack.progress import say, track
from quantrack.quantization.block_walk import BYTES_PER_GB, BlockWalk
from quantrack.quantization.importance import output_importance, with_covariance, without_covariance
from quantrack.quantization.input_columns import drawn_columns, input_columns, mean_column, output_size
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import QuantizedConvolution, layers_of_block, quantized_input, quantized_layers
from quantrack.quantization.state import DAMAGED
from quantrack.quantization.step_cache import cache_path, can_be_kept, forget_oldest, going_on_without, step_keys
from quantrack.schemes import Scheme

CONSTANT = 1e-6  # share of inputs' power about their mean, below which it is nothing but float32's rounding
MOST_CATEGORIES = 2**24  # that torch.multinomial draws from; positions of larger inputs are drawn evenly
ANY_MODE = Scheme("any mode", 8, None)
KEPT = "kept.json"  # beside the files of a kept walk: how many they are, and the seconds that it took


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


def float_curvatures(job: QuantizationJob, sampling: Sampling) -> Curvatures:
    """Curvatures by layer name, a few layers at a time in network order, of the inputs in the float network.

    It is walked once for the same model, pictures, settings and code: neither the job's weights nor its activations
    enter them, so all modes and bit plans share what is kept. Of a model without a digest nothing is.
    """
    found = _curvatures(job, job.float_model, sampling)
    if not can_be_kept(job):
        return found
    layers = sorted(quantized_layers(job.model))
    (key,) = step_keys(replace(job, scheme=ANY_MODE, plan=None), [(sampling, layers)])
    folder = cache_path(key, "curvatures")
    if folder.is_dir():
        try:
            kept, seconds = _read(folder, layers)
        except DAMAGED as error:
            if memory_problem(error):  # the files are whole
                raise
            say(f"cached curvatures {folder}: cannot be read ({type(error).__name__}); measuring again")
        else:
            say(f"GPTQ: curvatures of {len(layers)} layers (from the cache)")
            with suppress(OSError):  # forgotten by another process since, or only to be read; what was read stays
                os.utime(folder)
            job.cached_time.count(key, seconds)
            return ({name: one.to(job.device) for name, one in of.items()} for of in kept)
    job.cached_time.count(key, 0.0)
    return _kept(found, folder)


def curvatures_so_far(job: QuantizationJob, sampling: Sampling) -> Curvatures:
    """As `float_curvatures`, of the inputs in the job's own network; never kept.

    Layers are to be rounded before the next are asked for, as later ones see what they give.
    """
    return _curvatures(job, job.model, sampling)


def _curvatures(job: QuantizationJob, model: nn.Module, sampling: Sampling) -> Curvatures:
    """A Hessian takes 4 bytes * groups * (inputs per group)^2: a block is looked at as often as the memory needs."""
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


def _kept(found: Curvatures, folder: Path) -> Curvatures:
    """What is found, and a copy of it on disk once all of it was asked for."""
    with ExitStack() as stack:
        target: Path | None = None
        with going_on_without(folder.parent):
            target = stack.enter_context(atomic_folder(folder))
        seconds, count, began = 0.0, 0, time.perf_counter()
        for count, by_name in enumerate(found, 1):
            seconds += time.perf_counter() - began  # and not what is done with it
            parts = {name: vars(curvature) for name, curvature in by_name.items()}
            if target is not None:
                target = _written(target, partial(torch.save, parts, target / f"{count}.pt"))
            yield by_name
            began = time.perf_counter()
        if target is not None:
            target = _written(target, partial(write_json, target / KEPT, {"files": count, "seconds": seconds}))
    if target is not None:
        with going_on_without(folder.parent):
            forget_oldest(folder.parent, keep=folder)


def _written(folder: Path, write: Callable[[], object]) -> Path | None:
    """The folder with one file more; None, and no folder, where it cannot be written."""
    with going_on_without(folder.parent):
        write()
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _read(folder: Path, layers: list[str]) -> tuple[list[dict[str, Curvature]], float]:
    """All of a kept walk, which lies in the files until it is used, and the seconds that it took.

    Raises:
        ValueError: it is not of these layers.
    """
    kept = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    files = [
        torch.load(folder / f"{place}.pt", map_location="cpu", weights_only=True, mmap=True)
        for place in range(1, kept["files"] + 1)
    ]
    if sorted(name for file in files for name in file) != layers:
        raise ValueError(f"{folder}: other layers")
    return [{name: Curvature(**parts) for name, parts in file.items()} for file in files], float(kept["seconds"])


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


@torch.no_grad()
def _collect(walk: BlockWalk, block: Block, names: list[str], positions: _Positions) -> dict[str, Curvature]:
    """Of the named layers of one block, from one look at all of its input batches."""
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    pictures: Counter[str] = Counter()
    current = 0

    def collect(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        x = quantized_input(layer, inputs[0]) if isinstance(layer, QuantizedConvolution) else inputs[0]
        columns, weights = positions.of(name, current, x, layer)
        weighed = columns if weights is None else columns * weights
        means = weighed @ columns.transpose(1, 2) / columns.shape[2], weighed.mean(dim=2), mean_column(x, layer)
        inputs_sum, drawn_sum, sum_ = (len(x) * mean for mean in means)  # the last batch may be smaller
        before = sums.get(name, (0, 0, 0))
        sums[name] = before[0] + inputs_sum, before[1] + drawn_sum, before[2] + sum_
        pictures[name] += len(x)

    with ExitStack() as hooks:
        for name in names:
            hook = partial(collect, name)
            hooks.enter_context(walk.model.get_submodule(name).register_forward_pre_hook(hook))
        for current in range(walk.batch_count):
            run_block(walk.model, block, walk.inputs(block, current))
    found = {}
    for name, of in sums.items():
        inputs, drawn_mean, mean = (one / pictures[name] for one in of)
        found[name] = Curvature(inputs, drawn_mean, mean, positions.outputs.get(name))
    return found


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
