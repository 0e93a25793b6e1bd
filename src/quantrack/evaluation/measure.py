"""Prove an exported file: open it, compare it with PyTorch, time it, score it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantrack.datasets.coco import EvaluationSet
from quantrack.datasets.pictures import letterbox, network_input, read_picture
from quantrack.errors import QuantrackError
from quantrack.evaluation.coco_metrics import evaluate_coco
from quantrack.evaluation.decode import decode
from quantrack.evaluation.types import CocoResult, Detection
from quantrack.progress import track
from quantrack.runtime.latency import Latency, measure_latency
from quantrack.runtime.parity import Parity, measure_parity
from quantrack.runtime.placement import nodes_by_provider
from quantrack.runtime.session import Session

PARITY_PICTURES = 8
Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Speed:
    """How long one picture takes, and which provider ran how many nodes."""

    provider: str
    latency: Latency
    placement: dict[str, int]

    def metrics(self) -> dict[str, float]:
        placed = {f"nodes_on_{provider}": float(count) for provider, count in self.placement.items()}
        return self.latency.metrics() | placed


@dataclass(frozen=True)
class Proof:
    """What a file was seen to do; `parity` is None where there is no PyTorch model to compare with."""

    speed: Speed
    coco: CocoResult
    detections: tuple[Detection, ...]
    eval_seconds: float
    parity: Parity | None

    def metrics(self) -> dict[str, float]:
        parity = self.parity.metrics() if self.parity else {}
        return self.coco.metrics | self.speed.metrics() | parity | {"eval_seconds": self.eval_seconds}


def measure_speed(session: Session, latency_runs: int) -> Speed:
    """Time a session and count its nodes per provider."""
    return Speed(session.provider, measure_latency(session, latency_runs), nodes_by_provider(session))


def prove(
    session: Session, evaluation_set: EvaluationSet, head: str, latency_runs: int, model: nn.Module | None
) -> Proof:
    """Measure everything about an open file; `model` is its PyTorch twin where there is one."""
    parity = None
    if model is not None:
        parity = measure_parity(model, session, parity_inputs(evaluation_set, session.imgsz), head)
    speed = measure_speed(session, latency_runs)
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
        found += decode(run(image[None])[0], head, fit, picture.id, category_ids)
    return tuple(found)


def score_model(model: nn.Module, evaluation_set: EvaluationSet, head: str, imgsz: int, device: torch.device) -> float:
    """mAP50-95 of a PyTorch detector as it is, without an export."""

    @torch.no_grad()
    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = model(torch.from_numpy(image).to(device)).cpu().numpy()
        return output

    return evaluate_coco(evaluation_set, detect(run, imgsz, evaluation_set, head)).metrics["mAP50-95"]


def parity_inputs(evaluation_set: EvaluationSet, imgsz: int) -> Iterator[NDArray[np.float32]]:
    """The first few real pictures, as network inputs."""
    for picture in evaluation_set.pictures[:PARITY_PICTURES]:
        yield network_input(picture.path, imgsz)


def require_same_classes(class_count: int, evaluation_set: EvaluationSet, model: str) -> None:
    """Refuse a detector whose classes are not the annotations'.

    Raises:
        QuantrackError: the counts differ.
    """
    annotated = len(evaluation_set.categories)
    if class_count != annotated:
        raise QuantrackError(
            f"model={model}: detects {class_count} classes, but {evaluation_set.annotation_file} has {annotated}; "
            "use the annotations that the model was trained for"
        )


def require_output(session: Session, head: str, evaluation_set: EvaluationSet) -> None:
    """Check that a file's output is the head's: [1, N, 6], or [1, 4 + classes, anchors].

    Raises:
        QuantrackError: it is the other head's, or no detector's that Quantrack knows.
    """
    shape = session.output_shape
    one2many = (1, 4 + len(evaluation_set.categories))
    if len(shape) == 3 and shape[2] == 6 and shape[1] <= 300:
        actual = "one2one"
    elif shape[:2] == one2many:
        actual = "one2many"
    else:
        raise QuantrackError(
            f"onnx={session.path}: output {list(shape)} is neither [1, 300, 6] nor "
            f"[1, {one2many[1]}, anchors] for {len(evaluation_set.categories)} classes"
        )
    if actual != head:
        raise QuantrackError(f"onnx={session.path}: its output is the {actual} head's; use head={actual}")
