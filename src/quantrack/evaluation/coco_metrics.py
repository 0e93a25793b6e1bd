"""COCO box metrics by pycocotools, on exactly the pictures of an evaluation set."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from quantrack.datasets.coco import Category, EvaluationSet
from quantrack.errors import QuantrackError
from quantrack.evaluation.types import ClassResult, CocoResult, Detection

Score = TypeVar("Score", float, NDArray[np.float64])
# Where COCOeval.stats keeps each metric.
STATS = {
    "mAP50-95": 0,
    "mAP50": 1,
    "mAP75": 2,
    "mAP50-95_small": 3,
    "mAP50-95_medium": 4,
    "mAP50-95_large": 5,
    "AR100": 8,
}
ABSENT = -1.0  # pycocotools' mark of a mean over nothing
AT_50, AT_75 = 0, 5  # indices into COCOeval's IoU thresholds 0.50, 0.55 ... 0.95
ALL_SIZES, UP_TO_100 = 0, 2  # indices into its size ranges and detection limits


class ResultRow(TypedDict):
    """One row of a COCO results file; bbox is [x, y, width, height] in the picture's pixels."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float


def evaluate_coco(evaluation_set: EvaluationSet, detections: Sequence[Detection]) -> CocoResult:
    """Score detections against the set's ground truth; all values are in 0..1.

    No detections at all score 0.0. At most the 100 best detections of a picture and class count,
    as COCO defines it.

    Raises:
        QuantrackError: a detection belongs to a picture outside the set.
    """
    evaluation = coco_evaluation(evaluation_set, detections)
    with redirect_stdout(io.StringIO()):  # pycocotools prints its summary
        evaluation.accumulate()
        evaluation.summarize()
    precision = np.asarray(evaluation.eval["precision"], dtype=np.float64)[..., ALL_SIZES, UP_TO_100]
    return CocoResult(
        metrics=measured(evaluation.stats),
        classes=_class_results(evaluation_set, precision),
        recall_thresholds=np.asarray(evaluation.params.recThrs, dtype=np.float64),
        precision_at_50=class_mean(precision[AT_50]),
        precision_at_75=class_mean(precision[AT_75]),
    )


def coco_evaluation(
    evaluation_set: EvaluationSet, detections: Sequence[Detection], every_size: bool = True
) -> COCOeval:
    """pycocotools' evaluation of the set with detections matched to the truth, not yet accumulated.

    Without `every_size` boxes are matched once, whatever their size, in a quarter of the time and
    memory; such an evaluation has no metrics by size.

    Raises:
        QuantrackError: a detection belongs to a picture outside the set.
    """
    known = {picture.id for picture in evaluation_set.pictures}
    strangers = sorted({detection.image_id for detection in detections} - known)
    if strangers:
        raise QuantrackError(
            f"picture {strangers[0]}: has detections but is not in {evaluation_set.name}; "
            "evaluate detections on the set they were made from"
        )
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(_ground_truth(evaluation_set), _results(evaluation_set, detections), "bbox")
        if not every_size:
            evaluation.params.areaRng = [evaluation.params.areaRng[ALL_SIZES]]
        evaluation.evaluate()
    return evaluation


def drop_points(baseline: Score, value: Score) -> Score:
    """How many points (hundredths) of a 0..1 metric were lost; negative where it rose.

    >>> drop_points(0.75, 0.5)
    25.0
    """
    return 100 * (baseline - value)


def measured(stats: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Name COCOeval's twelve stats, leaving out what had no ground truth.

    >>> measured([0.5, 0.75, 0.5, -1, 0.25, 0.5, 0, 0, 0.5, 0, 0, 0])  # doctest: +NORMALIZE_WHITESPACE
    {'mAP50-95': 0.5, 'mAP50': 0.75, 'mAP75': 0.5, 'mAP50-95_medium': 0.25, 'mAP50-95_large': 0.5,
     'AR100': 0.5}
    """
    return {name: float(stats[index]) for name, index in STATS.items() if stats[index] != ABSENT}


def class_mean(precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean precision at each recall, [recalls, classes] -> [recalls], over classes with ground truth.

    >>> class_mean(np.array([[1.0, 0.5, -1.0], [0.5, 0.0, -1.0]])).tolist()
    [0.75, 0.25]
    """
    present = precision[:, (precision != ABSENT).all(axis=0)]
    if present.shape[1] == 0:
        return np.zeros(len(precision), dtype=np.float64)
    return np.asarray(present.mean(axis=1), dtype=np.float64)


def mean_or_none(precision: NDArray[np.float64]) -> float | None:
    """Average precision of one class; None where it has no ground truth.

    >>> mean_or_none(np.array([1.0, 0.5])), mean_or_none(np.array([-1.0, -1.0]))
    (0.75, None)
    """
    return None if (precision == ABSENT).any() else float(precision.mean())


def detections_json(detections: Sequence[Detection]) -> list[ResultRow]:
    """The rows of a COCO results file, unrounded.

    >>> detections_json([Detection(7, 1, (1.0, 2.0, 3.0, 4.0), 0.5)])
    [{'image_id': 7, 'category_id': 1, 'bbox': [1.0, 2.0, 3.0, 4.0], 'score': 0.5}]
    """
    return [
        ResultRow(
            image_id=detection.image_id,
            category_id=detection.category_id,
            bbox=list(detection.xywh),
            score=detection.score,
        )
        for detection in detections
    ]


def detections_from_json(rows: object) -> list[Detection]:
    """Read back what `detections_json` wrote, from parsed JSON.

    Raises:
        QuantrackError: it is not a list of COCO result rows.
    """
    if not isinstance(rows, list):
        raise QuantrackError("detections: not a list of COCO result rows; run the evaluation again")
    return [_detection(index, row) for index, row in enumerate(rows)]


def _detection(index: int, row: object) -> Detection:
    try:
        if not isinstance(row, dict):
            raise TypeError("not an object")
        x, y, width, height = (float(value) for value in row["bbox"])
        return Detection(int(row["image_id"]), int(row["category_id"]), (x, y, width, height), float(row["score"]))
    except (KeyError, TypeError, ValueError) as error:
        raise QuantrackError(
            f"detections: row {index} is not a COCO result row ({error}); run the evaluation again"
        ) from error


def _ground_truth(evaluation_set: EvaluationSet) -> COCO:
    rows = [
        {
            "id": index,
            "image_id": box.image_id,
            "category_id": box.category_id,
            "bbox": list(box.xywh),
            "area": box.area,
            "iscrowd": int(box.crowd),
        }
        for index, box in enumerate(evaluation_set.boxes, start=1)
    ]
    return _coco(evaluation_set, rows)


def _results(evaluation_set: EvaluationSet, detections: Sequence[Detection]) -> COCO:
    """What COCO.loadRes would make of the detections; loadRes itself fails where there are none."""
    rows = [
        {**row, "id": index, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for index, row in enumerate(detections_json(detections), start=1)
    ]
    return _coco(evaluation_set, rows)


def _coco(evaluation_set: EvaluationSet, annotations: Sequence[dict[str, object]]) -> COCO:
    # Annotation ids start at 1: COCOeval takes a match with id 0 for no match.
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": picture.id, "width": picture.width, "height": picture.height} for picture in evaluation_set.pictures
        ],
        "categories": [{"id": category.id, "name": category.name} for category in evaluation_set.categories],
        "annotations": list(annotations),
    }
    coco.createIndex()
    return coco


def _class_results(evaluation_set: EvaluationSet, precision: NDArray[np.float64]) -> tuple[ClassResult, ...]:
    """Per class, in the set's order; `precision` is [IoUs, recalls, classes], crowds are not counted."""
    counts = Counter(box.category_id for box in evaluation_set.boxes if not box.crowd)

    def result(index: int, category: Category) -> ClassResult:
        own = precision[:, :, index]
        return ClassResult(category.name, mean_or_none(own), mean_or_none(own[AT_50]), counts[category.id])

    ordered = sorted(evaluation_set.categories, key=lambda category: category.id)
    return tuple(result(index, category) for index, category in enumerate(ordered))
