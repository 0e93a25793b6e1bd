"""How closely a detector follows another one, without labels: the other's sure detections are the truth.

Labels of a hundred pictures leave a point of mAP and more to chance, however close two files are to each other. What
a file does to the detections of the network that it was made of is seen on every object, labelled or not: draws of one
recipe on 100 pictures scatter by a third of a point of agreement, where their mAP scatters by half a point, and a
recipe that is worse by a point of mAP is worse by six of agreement (docs/accuracy.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from quantrack.datasets.coco import Category, EvaluationSet, TrueBox
from quantrack.evaluation.coco_metrics import evaluate_coco
from quantrack.evaluation.types import Detection

SURE = 0.25  # the score from which a detection is an object, as in Ultralytics' prediction
COUNTED = 100  # detections of a picture and class, as COCO has it
APART = 100_000.0  # pixels between classes, so that pooled boxes of two classes never overlap
POOLED = Category(1, "any")


def agreement(evaluation_set: EvaluationSet, expected: Sequence[Detection], found: Sequence[Detection]) -> float | None:
    """mAP50-95 (0..1) of `found` with the sure detections of `expected` as truth; 1 if they are the same.

    Objects of all classes count alike: they are ranked and averaged together, and a detection of the wrong class is
    none. Of a picture its `COUNTED` surest count. None where nothing sure is expected. The set's own boxes are not
    looked at.

    Raises:
        QuantrackError: a detection belongs to a picture outside the set.
    """
    truth = tuple(
        TrueBox(one.image_id, POOLED.id, pooled(one).xywh, crowd=False, area=one.xywh[2] * one.xywh[3])
        for one in surest(expected)
    )
    followed = replace(evaluation_set, boxes=truth, categories=(POOLED,))
    return evaluate_coco(followed, [pooled(one) for one in found]).metrics.get("mAP50-95")


def surest(detections: Sequence[Detection]) -> list[Detection]:
    """What counts as objects: the sure detections, of each picture no more than are looked for in it."""
    by_picture: dict[int, list[Detection]] = defaultdict(list)
    for one in sorted(detections, key=lambda one: -one.score):
        if one.score >= SURE:
            by_picture[one.image_id].append(one)
    return [one for found in by_picture.values() for one in found[:COUNTED]]


def pooled(detection: Detection) -> Detection:
    """A detection of the one class that all are pooled in, out of the way of those of other classes."""
    x, y, width, height = detection.xywh
    return replace(detection, category_id=POOLED.id, xywh=(x + APART * detection.category_id, y, width, height))
