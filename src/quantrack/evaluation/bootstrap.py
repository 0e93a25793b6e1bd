"""How certain an mAP difference is: a paired bootstrap over the pictures.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), percentile interval. Pictures are
drawn with replacement, the same ones for both detectors, and mAP50-95 is computed anew as
pycocotools computes it. Detections are matched to the truth once: matching looks at one picture at a
time, so a resample only weighs each picture's matches by how often it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantrack.datasets.coco import EvaluationSet
from quantrack.errors import UsageError
from quantrack.evaluation.coco_metrics import coco_evaluation
from quantrack.evaluation.types import Detection
from quantrack.progress import track

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class BootstrapSettings:
    """How many resamples, how wide an interval, and the seed of the draws."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.confidence < 1:
            raise UsageError("bootstrap: resamples must be positive and confidence in 0..1")


@dataclass(frozen=True)
class DropInterval:
    """An interval for baseline minus candidate, in points of mAP50-95, from so many pictures."""

    low: float
    high: float
    pictures: int

    def metrics(self) -> dict[str, float]:
        """Under the names that all entry points share."""
        return {"mAP50-95_drop_ci_low": self.low, "mAP50-95_drop_ci_high": self.high}


def paired_drop_interval(
    evaluation_set: EvaluationSet,
    baseline: Sequence[Detection],
    candidate: Sequence[Detection],
    settings: BootstrapSettings | None = None,
) -> DropInterval:
    """The interval of `drop_points` between two detectors' detections on the same pictures."""
    settings = settings or BootstrapSettings()
    sides = [MatchedDetections(evaluation_set, detections) for detections in (baseline, candidate)]
    generator = np.random.default_rng(settings.seed)
    pictures = len(evaluation_set.pictures)
    drops = np.empty(settings.resamples)
    for index in track(range(settings.resamples), "bootstrap"):
        times_drawn = np.bincount(generator.integers(pictures, size=pictures), minlength=pictures)
        drops[index] = 100 * (sides[0].mean_ap(times_drawn) - sides[1].mean_ap(times_drawn))
    outside = (1 - settings.confidence) / 2
    low, high = np.quantile(drops, [outside, 1 - outside])
    return DropInterval(float(low), float(high), pictures)


@dataclass(frozen=True)
class _Threshold:
    """At one IoU: of the ranked detections, which are hits, and which count at all."""

    hits: Integers
    hit_class: Integers
    counted: NDArray[np.bool_]


class MatchedDetections:
    """One detector's detections on a set, matched once; classes without truth are left out."""

    def __init__(self, evaluation_set: EvaluationSet, detections: Sequence[Detection]) -> None:
        evaluation = coco_evaluation(evaluation_set, detections)
        self.recalls = np.asarray(evaluation.params.recThrs, dtype=np.float64)
        self.truths = _truth_counts(evaluation)  # [classes, pictures]
        with_truth = np.flatnonzero(self.truths.sum(axis=1))
        self.truths = self.truths[with_truth]
        ranked = [_ranked(evaluation, int(index)) for index in with_truth]
        self.picture = np.concatenate([picture for picture, _, _ in ranked] or [np.empty(0, np.int64)])
        sizes = np.array([len(picture) for picture, _, _ in ranked], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64)
        own_class = np.repeat(np.arange(len(with_truth)), sizes)
        self.thresholds = []
        for level in range(len(evaluation.params.iouThrs)):
            matched = np.concatenate([matches[level] for _, matches, _ in ranked] or [np.empty(0, bool)])
            counted = ~np.concatenate([ignored[level] for _, _, ignored in ranked] or [np.empty(0, bool)])
            hits = np.flatnonzero(matched & counted)
            self.thresholds.append(_Threshold(hits, own_class[hits], counted))

    def mean_ap(self, times_drawn: Integers) -> float:
        """mAP50-95 where picture i counts `times_drawn[i]` times; 0 where no truth was drawn."""
        truths = self.truths @ times_drawn
        present = truths > 0
        if not present.any():
            return 0.0
        weights = times_drawn[self.picture]
        needed = _hits_needed(truths, self.recalls)
        means = [self._precision(level, weights, needed)[present].mean() for level in self.thresholds]
        return float(np.mean(means))

    def _precision(self, level: _Threshold, weights: Integers, needed: Integers) -> Floats:
        """Interpolated precision [classes, recalls]: the best at this recall or a higher one.

        Only hits matter, as precision peaks at hits. Hits are summed over all classes in one run, so
        that one search finds the place of every class and recall.
        """
        classes = len(needed)
        if len(level.hits) == 0:
            return np.zeros(needed.shape)
        hits = np.cumsum(weights[level.hits])
        counted = np.concatenate([[0], np.cumsum(weights * level.counted)])
        ends = np.searchsorted(level.hit_class, np.arange(classes), side="right")
        hits_before = np.concatenate([[0], hits])[np.concatenate([[0], ends[:-1]])]
        own_hits = hits - hits_before[level.hit_class]
        own_counted = counted[level.hits + 1] - counted[self.starts][level.hit_class]
        precision = own_hits / (own_hits + (own_counted - own_hits) + np.spacing(1))
        # best so far from the right within each class: offsets keep the classes apart
        offset = 2.0 * (classes - 1 - level.hit_class)
        best = np.maximum.accumulate((precision + offset)[::-1])[::-1] - offset
        place = np.searchsorted(hits, hits_before[:, None] + needed, side="left")
        reached = place < ends[:, None]
        return np.where(reached, best[np.minimum(place, len(best) - 1)], 0.0)


def _hits_needed(truths: Integers, recalls: Floats) -> Integers:
    """The fewest hits of each class whose recall reaches each threshold, at least one; [classes, recalls]."""
    count = np.maximum(truths, 1)[:, None]
    needed = np.ceil(recalls * count).astype(np.int64)
    needed -= (needed - 1) / count >= recalls  # the product was rounded up or down
    needed += needed / count < recalls
    return np.maximum(needed, 1)


def _truth_counts(evaluation: Any) -> Integers:  # noqa: ANN401 - pycocotools is untyped
    """How many boxes of each class and picture count, [classes, pictures]."""
    classes, pictures = len(evaluation.params.catIds), len(evaluation.params.imgIds)
    counts = np.zeros((classes, pictures), dtype=np.int64)
    for index in range(classes):
        for picture, found in enumerate(_class_records(evaluation, index)):
            if found is not None:
                counts[index, picture] = np.count_nonzero(np.asarray(found["gtIgnore"]) == 0)
    return counts


def _ranked(evaluation: Any, index: int) -> tuple[Integers, NDArray[np.bool_], NDArray[np.bool_]]:  # noqa: ANN401
    """One class's detections by falling score: picture [N], matched and ignored [IoUs, N]."""
    levels = len(evaluation.params.iouThrs)
    found = [(picture, one) for picture, one in enumerate(_class_records(evaluation, index)) if one is not None]
    if not found:
        return np.empty(0, np.int64), np.empty((levels, 0), bool), np.empty((levels, 0), bool)
    scores = np.concatenate([np.asarray(one["dtScores"], dtype=np.float64) for _, one in found])
    order = np.argsort(-scores, kind="mergesort")
    pictures = np.concatenate([np.full(len(one["dtScores"]), picture) for picture, one in found])
    matched = np.concatenate([np.asarray(one["dtMatches"]) > 0 for _, one in found], axis=1)
    ignored = np.concatenate([np.asarray(one["dtIgnore"]) > 0 for _, one in found], axis=1)
    return pictures[order].astype(np.int64), matched[:, order], ignored[:, order]


def _class_records(evaluation: Any, index: int) -> list[Any]:  # noqa: ANN401
    """pycocotools' records of one class in all pictures, boxes of every size."""
    pictures, sizes = len(evaluation.params.imgIds), len(evaluation.params.areaRng)
    start = index * sizes * pictures
    records: list[Any] = evaluation.evalImgs[start : start + pictures]
    return records
