"""How closely a detector follows another one, without labels: the other's sure detections are the truth.

What a file does to the detections of the network that it was made of is seen on every object, labelled or not. Chance
moves it about as far as mAP, and a worse recipe several times as far (docs/accuracy.md), so that it tells files apart
whose mAP on a hundred pictures does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from quantrack.datasets.coco import Category, EvaluationSet, TrueBox
from quantrack.evaluation.coco_metrics import evaluate_coco
from quantrack.evaluation.picture_detector import CONFIDENCE
from quantrack.evaluation.types import Detection

SURE = CONFIDENCE  # the score from which a detection is shown to people
COUNTED = 100  # detections of a picture, as COCO has it
APART = 100_000.0  # pixels between classes, so that pooled boxes of two classes never overlap
POOLED = Category(1, "any")


def agreement(evaluation_set: EvaluationSet, expected: Sequence[Detection], found: Sequence[Detection]) -> float | None:
    """mAP50-95 (0..1) of `found` with the sure detections of `expected` as truth; 1 if they are the same.

    Objects of all classes count alike: they are ranked and averaged together, and a detection of the wrong class is
    none. Of a picture the `COUNTED` best of either side count. None where nothing sure is expected. The set's own boxes
    are not looked at.

    Raises:
        QuantrackError: one of `found` belongs to a picture outside the set.
    """
    class_ids = sorted({one.category_id for one in (*expected, *found)})
    places = {class_id: place for place, class_id in enumerate(class_ids)}
    truth = tuple(
        TrueBox(one.image_id, POOLED.id, _pooled(one, places).xywh, crowd=False, area=one.xywh[2] * one.xywh[3])
        for one in _best(one for one in expected if one.score >= SURE)
    )
    followed = replace(evaluation_set, boxes=truth, categories=(POOLED,))
    return evaluate_coco(followed, [_pooled(one, places) for one in _best(found)]).metrics.get("mAP50-95")


def _best(detections: Iterable[Detection]) -> list[Detection]:
    """The best of each picture, no more than count in it."""
    by_picture: dict[int, list[Detection]] = defaultdict(list)
    for one in sorted(detections, key=lambda one: -one.score):
        by_picture[one.image_id].append(one)
    return [one for found in by_picture.values() for one in found[:COUNTED]]


def _pooled(detection: Detection, places: Mapping[int, int]) -> Detection:
    """A detection of the one class that all are pooled in, out of the way of those of other classes."""
    x, y, width, height = detection.xywh
    return replace(detection, category_id=POOLED.id, xywh=(x + APART * places[detection.category_id], y, width, height))
