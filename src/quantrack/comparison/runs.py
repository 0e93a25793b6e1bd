"""A finished run as the comparison sees it, and which runs may be compared with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

ACCURACY, LATENCY, LATENCY_RATIO, SIZE = "mAP50-95", "latency_ms_p50", "latency_ratio", "onnx_mb"
AGREEMENT = "float32_agreement"
COMPARED = "compared_run_ids"  # the tag of a comparison that lists its runs
EVALUATION = ("evaluation_digest", "head", "imgsz")  # tags that make accuracies comparable
CIRCUMSTANCES = (*EVALUATION, "provider", "device_name")  # and latencies
FLOAT_LABELS = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class ComparisonKey:
    """A drop may be stated only against a result where all of this is equal; the fields are the runs' tags."""

    model_digest: str
    evaluation_digest: str
    head: str
    imgsz: int
    provider: str

    def tags(self) -> dict[str, str]:
        """The key as it is tagged."""
        return {name: str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Circumstances:
    """What a number was measured on: only runs where all of this is equal are ranked together."""

    pictures: str = field(compare=False)  # their name; the digest says whether they are the same
    evaluation_digest: str
    head: str
    imgsz: str
    provider: str
    device_name: str

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.pictures} (digest {self.evaluation_digest[:12]}), head {self.head}, {self.imgsz} px, "
            f"ONNX Runtime {self.provider} on {self.device_name}"
        )


@dataclass(frozen=True)
class ClassScore:
    """Average precision of one class with ground truth, and its true boxes."""

    name: str
    ap: float
    boxes: int


@dataclass(frozen=True)
class Sample:
    """A picture with the true boxes and with the run's detections drawn on it: RGB, shape [height, width, 3]."""

    name: str
    truth: NDArray[np.uint8]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class ComparedRun:
    """What one run measured; what it did not measure is absent.

    `ranges` are its activation quantizers' lower and upper ends by layer, empty where activations stay
    float; `classes` are those with ground truth; `resampled` is mAP50-95 on resampled pictures, the same ones for
    all runs on a set, [resamples].
    """

    run_id: str
    name: str
    mode: str
    recipe: str
    model: str
    circumstances: Circumstances
    metrics: Mapping[str, float]
    classes: tuple[ClassScore, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    label: str = ""
    variant: str = ""
    model_digest: str = ""
    resampled: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Group:
    """Runs measured under the same circumstances, the best accuracy first."""

    circumstances: Circumstances
    runs: tuple[ComparedRun, ...]

    @property
    def latency(self) -> str:
        """The metric by which its runs' latencies are ranked; of several detectors ratios say nothing."""
        detectors = {(run.model, run.model_digest) for run in self.runs}
        timed = [run.metrics for run in self.runs if LATENCY in run.metrics]
        return latency_measure(timed) if len(detectors) == 1 else LATENCY

    def float_run(self, run: ComparedRun) -> ComparedRun | None:
        """The most accurate float32 run of a run's checkpoint in this group; file names say nothing of content."""
        checkpoint = (run.model, run.model_digest)
        same = (one for one in self.runs if (one.model, one.model_digest) == checkpoint)
        return next((one for one in same if one.mode == "fp32"), None)


def latency_measure(runs: Sequence[Mapping[str, float]]) -> str:
    """The metric by which latencies of one detector's runs are ranked.

    It is the ratio to float32, timed in turns, where all have it: milliseconds of two hours differ by more than modes.
    """
    return LATENCY_RATIO if all(LATENCY_RATIO in metrics for metrics in runs) else LATENCY


def comparable_groups(runs: Sequence[ComparedRun]) -> tuple[Group, ...]:
    """Runs grouped by circumstances, the largest group first, each run labelled."""
    labelled = labels(runs)
    found: dict[Circumstances, list[ComparedRun]] = {}
    for run in labelled:
        found.setdefault(run.circumstances, []).append(run)
    groups = [Group(key, tuple(sorted(members, key=_rank))) for key, members in found.items()]
    return tuple(sorted(groups, key=lambda group: -len(group.runs)))


def labels(runs: Sequence[ComparedRun]) -> tuple[ComparedRun, ...]:
    """The runs with a short label each, made longer only where two would have the same.

    A label says the mode and the variant, then the recipe, the average bits, the model and the run, as far as needed.
    """
    names = [[part] for part in (FLOAT_LABELS.get(run.mode, run.mode.upper()) for run in runs)]
    names = [[*name, run.variant] if run.variant else name for name, run in zip(names, runs, strict=True)]
    for more in (_recipe, _bits, lambda run: run.model, lambda run: run.run_id[:8]):
        counts = Counter(" ".join(name) for name in names)
        for name, run in zip(names, runs, strict=True):
            if counts[" ".join(name)] > 1 and more(run):
                name.append(more(run))
    return tuple(replace(run, label=" ".join(name)) for run, name in zip(runs, names, strict=True))


def _recipe(run: ComparedRun) -> str:
    return "" if run.mode in FLOAT_LABELS else run.recipe


def _bits(run: ComparedRun) -> str:
    bits = run.metrics.get("weight_bits_avg")
    return "" if bits is None else f"{bits:.2f} bits"


def _rank(run: ComparedRun) -> float:
    return -run.metrics.get(ACCURACY, float("-inf"))


def pareto_front(runs: Sequence[ComparedRun], cost: str) -> tuple[ComparedRun, ...]:
    """The runs that no other beats in accuracy without costing more; runs lacking either are left out.

    `cost` is a metric of which less is better.
    """
    measured = [run for run in runs if ACCURACY in run.metrics and cost in run.metrics]
    ordered = sorted(measured, key=lambda run: (run.metrics[cost], -run.metrics[ACCURACY]))
    front: list[ComparedRun] = []
    for run in ordered:
        last = front[-1].metrics if front else None
        alike = last is not None and (run.metrics[cost], run.metrics[ACCURACY]) == (last[cost], last[ACCURACY])
        if last is None or alike or run.metrics[ACCURACY] > last[ACCURACY]:
            front.append(run)
    return tuple(front)
