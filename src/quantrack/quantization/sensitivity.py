"""How much each convolution alone costs, quantized to few bits in a network that is float otherwise.

The table that a bit plan is made of. Weights are rounded as a recipe would round them (MSE scales,
then GPTQ), each layer is put alone into the float network, and the raw outputs are compared with the
float ones over calibration pictures.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from quantrack.detector.roles import Role, convolution_roles
from quantrack.errors import UsageError
from quantrack.files import write_json
from quantrack.progress import say, track
from quantrack.quantization.bit_plan import BIT_RANGE, BitPlan, LayerCost, solve_bits
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert import InsertQuantizers
from quantrack.quantization.job import QuantizationJob, StepReport, first_pictures
from quantrack.quantization.layer_trials import trial_errors
from quantrack.quantization.layers import quantized_layers
from quantrack.quantization.step_cache import kept_path, step_keys
from quantrack.quantization.weight_scales import MseWeightScales
from quantrack.schemes import Scheme

WEIGHTS_ONLY = Scheme("weights only", 4, None)
WeightsByLayer = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerTrials:
    """Which bits each layer is tried at, and on how many of the calibration pictures."""

    bits: tuple[int, ...] = (4, 5, 6, 8)
    images: int = 32
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


@dataclass(frozen=True)
class Measured:
    """The table, and the seconds that measuring it took; `cached` if an earlier run did it."""

    rows: tuple[LayerSensitivity, ...]
    seconds: float
    cached: bool


def kept_sensitivity(job: QuantizationJob, settings: LayerTrials) -> Measured:
    """As `measure_sensitivity`, measured once for the same model, pictures, settings and code.

    Activations do not enter it, so w4a8 and w4a16 share what is kept.
    """
    (key,) = step_keys(replace(job, scheme=WEIGHTS_ONLY, plan=None), [settings])
    path = kept_path(f"{key}.json", "sensitivity")
    if path.is_file():
        try:
            kept = _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"cached sensitivity {path}: cannot be read ({type(error).__name__}); measuring again")
        else:
            say(f"sensitivity: {len(kept.rows)} layers, {kept.seconds:.1f} s (from the cache)")
            return kept
    began = time.perf_counter()
    rows = measure_sensitivity(job, settings)
    seconds = time.perf_counter() - began
    records = [asdict(row) | {"role": row.role.value} for row in rows]
    write_json(path, {"seconds": seconds, "rows": records})
    return Measured(rows, seconds, cached=False)


def _read(path: Path) -> Measured:
    kept = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        LayerSensitivity(
            row["name"], Role(row["role"]), row["weights"], {int(bits): error for bits, error in row["errors"].items()}
        )
        for row in kept["rows"]
    ]
    return Measured(tuple(rows), kept["seconds"], cached=True)


def plan_job(job: QuantizationJob, settings: LayerTrials, average_bits: float) -> StepReport:
    """Give the job the plan of least error under a budget; reported as a step, as it takes a step's time."""
    measured = kept_sensitivity(job, settings)
    job.plan = plan_bits(job, measured.rows, average_bits)
    planned = sum(row.errors[job.plan.bits[row.name]] for row in measured.rows)
    return StepReport("Sensitivity", measured.seconds, {"planned_error": planned}, measured.cached)


def measure_sensitivity(job: QuantizationJob, settings: LayerTrials) -> tuple[LayerSensitivity, ...]:
    """The error of each convolution at each number of bits, alone; `job` is left as it was.

    Time: two passes over the GPTQ pictures for each number of bits, and for each layer and number of
    bits a part of a pass over `images` pictures.
    """
    candidates = rounded_weights(job, settings)
    probe = copy.deepcopy(job.float_model)
    roles = convolution_roles(probe)
    weights = candidates[settings.bits[0]]
    trials = {
        name: {bits: partial(weights_replaced, probe, name, by_layer[name]) for bits, by_layer in candidates.items()}
        for name in weights
    }
    few = first_pictures(job, settings.images)
    errors = trial_errors(few, probe, trials, lambda apart: apart.outputs, "sensitivity")
    return tuple(LayerSensitivity(name, roles[name], weights[name].numel(), errors[name]) for name in weights)


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
