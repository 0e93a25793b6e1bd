"""Prove an exported file: open it, compare it with PyTorch, time it, score it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from quantrack.datasets.coco import EvaluationSet, require_annotated_size
from quantrack.datasets.pictures import letterbox, network_input, read_picture
from quantrack.errors import QuantrackError, UsageError
from quantrack.evaluation.coco_metrics import evaluate_coco
from quantrack.evaluation.decode import decode
from quantrack.evaluation.types import CocoResult, Detection
from quantrack.progress import say, track
from quantrack.runtime.latency import Latency, Ratio, measure_in_turns
from quantrack.runtime.machine_load import OtherLoad, watch_other_load
from quantrack.runtime.parity import Network, Parity, measure_parity, torch_network
from quantrack.runtime.placement import Placement, measure_placement
from quantrack.runtime.session import Session, SessionSettings
from quantrack.schemes import MAX_DETECTIONS, ONE2MANY, ONE2ONE

PARITY_PICTURES = 8


@dataclass(frozen=True)
class Speed:
    """How long one picture takes, and what ran on which provider.

    `ratio` is the latency over that of another file that was timed in turns with it; None where there was none.
    """

    provider: str
    latency: Latency
    placement: Placement
    session: SessionSettings
    other_load: OtherLoad
    ratio: Ratio | None = None

    @property
    def session_settings(self) -> str:
        """What of the session's settings differs from the defaults, for people."""
        return self.session.text

    def metrics(self) -> dict[str, float]:
        measured = self.latency.metrics() | self.placement.metrics() | self.other_load.metrics()
        return measured | (self.ratio.metrics() if self.ratio else {})


@dataclass(frozen=True)
class Proof:
    """What a file was seen to do; `parity` is None where there is nothing to compare with."""

    speed: Speed
    coco: CocoResult
    detections: tuple[Detection, ...]
    eval_seconds: float
    parity: Parity | None

    def metrics(self) -> dict[str, float]:
        parity = self.parity.metrics() if self.parity else {}
        return self.coco.metrics | self.speed.metrics() | parity | {"eval_seconds": self.eval_seconds}


def measure_speed(session: Session, latency_runs: int, beside: Session | None = None) -> Speed:
    """Time a session, in turns with another one where it is given, and see which provider ran what."""
    with watch_other_load() as load:
        latencies, ratios = measure_in_turns([beside, session] if beside else [session], latency_runs)
    if load.disturbs:
        say(f"latency: other processes kept {load.cores:.1f} cores busy meanwhile; measure again on an idle machine")
    ratio = ratios[-1] if beside else None
    placement = measure_placement(session)
    return Speed(session.provider, latencies[-1], placement, session.settings, load, ratio)


def prove(
    session: Session,
    evaluation_set: EvaluationSet,
    head: str,
    latency_runs: int,
    reference: Network | None,
    beside: Session | None = None,
) -> Proof:
    """Measure everything about an open file.

    `reference` says what it should give, where something does; `beside` is the float32 file to time it with.
    """
    parity = None
    if reference is not None:
        parity = measure_parity(reference, session, parity_inputs(evaluation_set, session.imgsz), head)
    speed = measure_speed(session, latency_runs, beside)
    start = time.perf_counter()
    detections = detect(session.run, session.imgsz, evaluation_set, head)
    coco = evaluate_coco(evaluation_set, detections)
    return Proof(speed, coco, detections, time.perf_counter() - start, parity)


def detect(run: Network, imgsz: int, evaluation_set: EvaluationSet, head: str) -> tuple[Detection, ...]:
    """Detections on every picture of the set, read, letterboxed and decoded one at a time."""
    category_ids = [category.id for category in evaluation_set.categories]
    found: list[Detection] = []
    for picture in track(evaluation_set.pictures, "evaluating"):
        image, fit = letterbox(read_picture(picture.path), imgsz)
        require_annotated_size(picture, (fit.width, fit.height), evaluation_set.annotation_file)
        found += decode(run(image[None])[0], head, fit, picture.id, category_ids)
    return tuple(found)


def score_model(model: nn.Module, evaluation_set: EvaluationSet, head: str, imgsz: int) -> float:
    """mAP50-95 of a PyTorch detector as it is, without an export."""
    return evaluate_coco(evaluation_set, detect(torch_network(model), imgsz, evaluation_set, head)).metrics["mAP50-95"]


def parity_inputs(evaluation_set: EvaluationSet, imgsz: int) -> Iterator[NDArray[np.float32]]:
    """The first few real pictures, as network inputs."""
    for picture in evaluation_set.pictures[:PARITY_PICTURES]:
        yield network_input(picture.path, imgsz)


def require_same_classes(class_names: Sequence[str], evaluation_set: EvaluationSet, given: str) -> None:
    """Refuse a detector whose classes are not the annotations', which belong together by their order.

    `given` is the setting that named the detector, with its value. Names need not be equal, as those of a checkpoint
    may be in another language; the same name at another place is a mistake.

    Raises:
        QuantrackError: the counts or the order differ.
    """
    annotated = [category.name for category in evaluation_set.categories]
    where = evaluation_set.annotation_file
    if len(class_names) != len(annotated):
        raise QuantrackError(
            f"{given}: detects {len(class_names)} classes, but {where} has {len(annotated)}; "
            "use the annotations that the model was trained for"
        )
    elsewhere = (
        place
        for place, name in enumerate(class_names)
        if annotated[place] != name and class_names.count(name) == annotated.count(name) == 1
    )
    place = next(elsewhere, None)
    if place is not None:
        raise QuantrackError(
            f"{given}: its class {place} is {class_names[place]}, but number {place} of {where} by id is "
            f"{annotated[place]}; give the categories ids in the order of the model's classes"
        )


def require_output(session: Session, head: str, evaluation_set: EvaluationSet) -> None:
    """Check that a file's output is the head's: [1, N, 6], or [1, 4 + classes, anchors].

    Raises:
        UsageError: it is the other head's.
        QuantrackError: it is no detector's that Quantrack knows.
    """
    shape = session.output_shape
    one2many = (1, 4 + len(evaluation_set.categories))
    if len(shape) == 3 and shape[2] == 6 and shape[1] <= MAX_DETECTIONS:
        actual = ONE2ONE
    elif shape[:2] == one2many:
        actual = ONE2MANY
    else:
        raise QuantrackError(
            f"onnx={session.path}: output {list(shape)} is neither [1, {MAX_DETECTIONS}, 6] nor "
            f"[1, {one2many[1]}, anchors] for {len(evaluation_set.categories)} classes"
        )
    if actual != head:
        raise UsageError(f"onnx={session.path}: its output is the {actual} head's; use head={actual}")
