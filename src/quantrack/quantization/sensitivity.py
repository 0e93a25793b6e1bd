"""How much each convolution alone costs, quantized to few bits in a network that is float otherwise.

The table that a bit plan is made of. Weights are rounded as a recipe would round them (MSE scales,
then GPTQ), each layer is put alone into the float network, and the raw outputs are compared with the
float ones over calibration pictures.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quantrack.detector.blocks import INPUT, network_blocks, run_block, run_blocks
from quantrack.detector.heads import RawOutputTap, raw_outputs
from quantrack.detector.roles import Role, convolution_roles
from quantrack.errors import UsageError
from quantrack.files import write_json
from quantrack.progress import say, track
from quantrack.quantization.bit_plan import BIT_RANGE, BitPlan, LayerCost, solve_bits
from quantrack.quantization.divergence import divergence
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert import InsertQuantizers
from quantrack.quantization.job import QuantizationJob, first_pictures
from quantrack.quantization.layers import quantized_layers
from quantrack.quantization.step_cache import kept_path, step_keys
from quantrack.quantization.weight_scales import MseWeightScales
from quantrack.schemes import Scheme

WEIGHTS_ONLY = Scheme("weights only", 4, None)
BATCH = 4  # every block's outputs of a batch are held at once
WeightsByLayer = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerTrials:
    """Which bits each layer is tried at, and on how many of the calibration pictures."""

    bits: tuple[int, ...] = (4, 5, 6, 8)
    images: int = 16
    gptq_images: int = 100

    def __post_init__(self) -> None:
        if len(self.bits) < 2 or any(bits not in BIT_RANGE for bits in self.bits):
            raise UsageError(f"sensitivity: bits={self.bits}: give at least two of 2 to 8")
        if self.images < 1 or self.gptq_images < 1:
            raise UsageError("sensitivity: images and gptq_images must be positive")


@dataclass(frozen=True)
class LayerSensitivity:
    """One convolution's row: `errors` by bits, as `Divergence.outputs` per object."""

    name: str
    role: Role
    weights: int
    errors: Mapping[int, float]

    @property
    def cost(self) -> LayerCost:
        return LayerCost(self.name, self.weights, self.errors)


def kept_sensitivity(job: QuantizationJob, settings: LayerTrials) -> tuple[LayerSensitivity, ...]:
    """As `measure_sensitivity`, measured once for the same model, pictures, settings and code.

    Activations do not enter it, so w4a8 and w4a16 share what is kept.
    """
    (key,) = step_keys(replace(job, scheme=WEIGHTS_ONLY, plan=None), [settings])
    path = kept_path(f"{key}.json", "sensitivity")
    if path.is_file():
        try:
            rows = _read_rows(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"cached sensitivity {path}: cannot be read ({type(error).__name__}); measuring again")
        else:
            say(f"sensitivity: {len(rows)} layers (from the cache)")
            return rows
    rows = measure_sensitivity(job, settings)
    write_json(path, [asdict(row) | {"role": row.role.value} for row in rows])
    return rows


def _read_rows(path: Path) -> tuple[LayerSensitivity, ...]:
    return tuple(
        LayerSensitivity(
            row["name"], Role(row["role"]), row["weights"], {int(bits): error for bits, error in row["errors"].items()}
        )
        for row in json.loads(path.read_text(encoding="utf-8"))
    )


def measure_sensitivity(job: QuantizationJob, settings: LayerTrials) -> tuple[LayerSensitivity, ...]:
    """The error of each convolution at each number of bits, alone; `job` is left as it was.

    Time: two passes over the GPTQ pictures for each number of bits, and for each layer and number of
    bits a part of a pass over `images` pictures.
    """
    candidates = rounded_weights(job, settings)
    probe = copy.deepcopy(job.float_model)
    roles = convolution_roles(probe)
    names = list(candidates[settings.bits[0]])
    sums = {name: dict.fromkeys(settings.bits, 0.0) for name in names}
    few = replace(first_pictures(job, settings.images), batch=BATCH)
    with torch.no_grad(), raw_outputs(probe) as tap:
        for batch in track(few.batches(), "sensitivity", total=few.batch_count):
            share = len(batch) / len(few.calibration.paths)
            for name, bits, error in _errors_of_batch(probe, tap, batch, candidates):
                sums[name][bits] += share * error
    weights = candidates[settings.bits[0]]
    return tuple(LayerSensitivity(name, roles[name], weights[name].numel(), sums[name]) for name in names)


def measure_score_sensitivity(
    job: QuantizationJob, settings: LayerTrials, score: Callable[[nn.Module], float]
) -> tuple[LayerSensitivity, ...]:
    """As `measure_sensitivity`, the errors being what a score of the whole detector loses, at least 0.

    `score` takes a detector, as `job.float_model` is one; it is called once a layer and number of bits.
    """
    candidates = rounded_weights(job, settings)
    probe = copy.deepcopy(job.float_model)
    whole = score(probe)
    roles = convolution_roles(probe)
    rows = []
    for name in track(list(candidates[settings.bits[0]]), "sensitivity by score"):
        errors = {}
        for bits, by_layer in candidates.items():
            with weights_replaced(probe, name, by_layer[name]):
                errors[bits] = max(0.0, whole - score(probe))
        rows.append(LayerSensitivity(name, roles[name], candidates[settings.bits[0]][name].numel(), errors))
    return tuple(rows)


def plan_bits(job: QuantizationJob, rows: Sequence[LayerSensitivity], average_bits: float) -> BitPlan:
    """The plan of least total error whose weighted average is at most `average_bits`."""
    return BitPlan(job.model_digest, solve_bits([row.cost for row in rows], average_bits))


def rounded_weights(job: QuantizationJob, settings: LayerTrials) -> dict[int, WeightsByLayer]:
    """Every convolution's weights by module name, on their grids of each of the numbers of bits."""
    few = first_pictures(job, settings.gptq_images)
    trials = {bits: _trial(few, bits) for bits in settings.bits}
    layers = {bits: quantized_layers(trial.model) for bits, trial in trials.items()}
    gptq = Gptq()
    # the Hessians are of the float network's inputs, so one walk serves all
    for hessians in gptq.hessians(trials[settings.bits[0]], job.float_model):
        for name, hessian in hessians.items():
            for bits in settings.bits:
                gptq.round_layer(layers[bits][name], hessian)
    return {
        bits: {name: layer.quant_weight().value.detach() for name, layer in by_name.items()}
        for bits, by_name in layers.items()
    }


def _trial(job: QuantizationJob, bits: int) -> QuantizationJob:
    """A job with every convolution at so many bits, its scales set."""
    scheme = Scheme(f"w{bits}a16", bits, None)
    trial = replace(job, model=copy.deepcopy(job.float_model), scheme=scheme, plan=None)
    for step in (InsertQuantizers(roles_at_8_bits=()), MseWeightScales()):
        step.apply(trial)
    return trial


@contextmanager
def weights_replaced(model: nn.Module, name: str, weights: Tensor) -> Iterator[None]:
    """A model with other weights in one convolution, for a while."""
    own: Tensor = model.get_submodule(name).weight.data  # type: ignore[assignment]
    kept = own.clone()
    try:
        own.copy_(weights)
        yield
    finally:
        own.copy_(kept)


def _errors_of_batch(
    probe: nn.Module, tap: RawOutputTap, batch: Tensor, candidates: Mapping[int, WeightsByLayer]
) -> Iterator[tuple[str, int, float]]:
    """Layer, bits and error; only the blocks from the layer's own on are run again."""
    blocks = network_blocks(probe)
    outputs = {INPUT: batch}
    for block in blocks:
        outputs[block.index] = run_block(probe, block, [outputs[source] for source in block.sources])
    reference = tap.taken()
    for block in blocks:
        for bits, by_layer in candidates.items():
            for name in filter(block.holds, by_layer):
                with weights_replaced(probe, name, by_layer[name]):
                    run_blocks(probe, blocks[block.index :], outputs)
                apart = divergence(tap.taken(), reference)
                yield name, bits, float(apart.outputs)
