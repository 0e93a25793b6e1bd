"""How certain an mAP difference is: a paired bootstrap over the pictures.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), percentile interval. Pictures are
drawn with replacement, the same ones for both detectors, and mAP50-95 is computed anew as
pycocotools computes it. Detections are matched to the truth once: matching looks at one picture at a
time, so a resample only weighs each picture's matches by how often it was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools.cocoeval import COCOeval

from quantrack.datasets.coco import EvaluationSet
from quantrack.errors import UsageError
from quantrack.evaluation.coco_metrics import coco_evaluation, drop_points
from quantrack.evaluation.types import Detection
from quantrack.progress import track

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
LEAST_PICTURES = 5  # resamples of fewer are so alike that an interval would look sure; of one they are all the same
Record = Mapping[str, ArrayLike]  # what pycocotools keeps of one picture and class


@dataclass(frozen=True)
class BootstrapSettings:
    """How many resamples, which share of them the interval holds, and the seed of the draws.

    Raises:
        UsageError: no resamples, a confidence outside 0..1 or a negative seed.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UsageError(f"resamples={self.resamples}: must be at least 1")
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence={self.confidence}: must lie between 0 and 1, such as 0.95")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: must not be negative")


@dataclass(frozen=True)
class DropInterval:
    """An interval for baseline minus candidate, in points (hundredths) of mAP50-95.

    Positive where the candidate is worse, as `drop_points`. `resamples` and `pictures` say what it
    was made of.
    """

    low: float
    high: float
    resamples: int
    pictures: int

    def metrics(self, quantity: str = "drop") -> dict[str, float]:
        """Under the names that all entry points share; nothing where there are too few pictures for an interval."""
        ends = {f"mAP50-95_{quantity}_ci_low": self.low, f"mAP50-95_{quantity}_ci_high": self.high}
        return ends if self.pictures >= LEAST_PICTURES else {}


def paired_drop_interval(
    evaluation_set: EvaluationSet,
    baseline: Sequence[Detection],
    candidate: Sequence[Detection],
    settings: BootstrapSettings | None = None,
) -> DropInterval:
    """The interval of `drop_points` between two detectors' detections on the same pictures.

    Any two runs on the set can be held against each other. Equal inputs give equal intervals.

    Raises:
        QuantrackError: a detection belongs to a picture outside the set.
    """
    settings = settings or BootstrapSettings()
    first, second = (resampled_map(evaluation_set, each, settings) for each in (baseline, candidate))
    low, high = drop_bounds(first, second, settings.confidence)
    return DropInterval(low, high, settings.resamples, len(evaluation_set.pictures))


def resampled_map(
    evaluation_set: EvaluationSet, detections: Sequence[Detection], settings: BootstrapSettings
) -> Floats:
    """One detector's mAP50-95 (0..1) on each resample, [resamples]; equal settings draw the same pictures.

    Raises:
        QuantrackError: a detection belongs to a picture outside the set.
    """
    draws = _draws(len(evaluation_set.pictures), settings)
    matched = MatchedDetections(evaluation_set, detections, int(draws.max()))
    return np.array([matched.mean_ap(drawn) for drawn in track(draws, "bootstrap")])


def drop_bounds(baseline: Floats, candidate: Floats, confidence: float) -> tuple[float, float]:
    """The middle `confidence` of the drops between two detectors on the same resamples, in points."""
    outside = (1 - confidence) / 2
    low, high = np.quantile(drop_points(baseline, candidate), [outside, 1 - outside])
    return float(low), float(high)


def _draws(pictures: int, settings: BootstrapSettings) -> Integers:
    """How often each resample draws each picture, [resamples, pictures]; rows sum to `pictures`."""
    generator = np.random.default_rng(settings.seed)
    rows = [generator.integers(pictures, size=pictures) for _ in range(settings.resamples)]
    return np.stack([np.bincount(row, minlength=pictures) for row in rows])


@dataclass(frozen=True)
class _Ranking:
    """N detections, class after class, within a class by falling score."""

    own_class: Integers  # [N]
    picture: Integers  # [N]
    score: Floats  # [N]
    matched: Booleans  # [IoUs, N]
    ignored: Booleans  # [IoUs, N], neither hit nor miss: found a crowd

    def hits(self) -> Booleans:
        """Which detections found a box at which IoU, [IoUs, N]."""
        return self.matched & ~self.ignored


@dataclass(frozen=True)
class _Hits:
    """The H hits at all IoUs, one IoU after the other, and what was ignored before them.

    A group is a class at an IoU: its hits lie together, by falling score.
    """

    places: Integers  # [H], in the ranking
    own_class: Integers  # [H]
    group: Integers  # [H], rising
    before_group: Integers  # [H], how many hits lie before the hit's group
    ignored: Integers  # places, rising within an IoU
    ignored_before: Integers  # [H], how many of `ignored` lie before the hit
    ignored_before_group: Integers  # [H], and before the hit's group


class MatchedDetections:
    """One detector's detections on a set, matched once; classes without truth are left out.

    `most_drawn` is how often a picture may count at most. Pictures are in the order of their ids.

    Raises:
        QuantrackError: a detection belongs to a picture outside the set.
    """

    def __init__(self, evaluation_set: EvaluationSet, detections: Sequence[Detection], most_drawn: int) -> None:
        evaluation = coco_evaluation(evaluation_set, detections, every_size=False)
        truths = _truth_counts(evaluation)
        with_truth = np.flatnonzero(truths.sum(axis=1))
        ranking = _ranking(evaluation, with_truth)
        source, self._copy, self._tied = _copies(ranking, most_drawn)
        own_class = ranking.own_class[source]
        self.most_drawn = most_drawn
        self._recalls = np.asarray(evaluation.params.recThrs, dtype=np.float64)
        self._truths = truths[with_truth]
        self._picture = ranking.picture[source]
        self._starts = np.searchsorted(own_class, np.arange(len(with_truth)))
        self._groups = len(ranking.matched) * len(with_truth)
        self._hits = self._find_hits(ranking.hits()[:, source], ranking.ignored[:, source], own_class)

    def mean_ap(self, times_drawn: Integers) -> float:
        """mAP50-95 (0..1) where picture i counts `times_drawn[i]` times; 0 where no truth was drawn.

        Raises:
            ValueError: a picture counts more often than `most_drawn`.
        """
        if times_drawn.max() > self.most_drawn:
            raise ValueError(f"a picture was drawn {times_drawn.max()} times; at most {self.most_drawn} were announced")
        truths = self._truths @ times_drawn
        present = truths > 0
        if not present.any():
            return 0.0
        drawn = times_drawn[self._picture]
        weights = np.where(self._tied, drawn > self._copy, drawn)
        seen = _sums_before(weights)
        return float(self._average_precision(weights, seen, truths)[:, present].mean())

    def _find_hits(self, hits: Booleans, ignored: Booleans, own_class: Integers) -> _Hits:
        level, places = np.nonzero(hits)
        ignored_level, ignored_places = np.nonzero(ignored)
        hit_class, length = own_class[places], len(own_class)
        group = level * len(self._truths) + hit_class
        ignored_at = ignored_level * length + ignored_places
        return _Hits(
            places=places,
            own_class=hit_class,
            group=group,
            before_group=np.searchsorted(group, group),
            ignored=ignored_places,
            ignored_before=np.searchsorted(ignored_at, level * length + places),
            ignored_before_group=np.searchsorted(ignored_at, level * length + self._starts[hit_class]),
        )

    def _average_precision(self, weights: Integers, seen: Integers, truths: Integers) -> Floats:
        """Of each IoU and class, [IoUs, classes]: the mean over recalls of the best precision at this one or a higher.

        Only hits matter, as precision peaks at hits, and of a hit's copies the last has the best. Each hit answers for
        the recalls that it is the first to reach, so that nothing need be looked up for each class and recall.
        """
        at = self._hits
        hits, ignored = _sums_before(weights[at.places]), _sums_before(weights[at.ignored])
        own_hits = hits[1:] - hits[at.before_group]
        own_seen = seen[at.places + 1] - seen[self._starts[at.own_class]]
        own_ignored = ignored[at.ignored_before] - ignored[at.ignored_before_group]
        precision = own_hits / (own_seen - own_ignored + np.spacing(1))
        # best so far from the right within each group: offsets keep the groups apart
        offset = 2.0 * (self._groups - 1 - at.group)
        best = np.maximum.accumulate((precision + offset)[::-1])[::-1] - offset
        reached = np.searchsorted(self._recalls, own_hits / np.maximum(truths, 1)[at.own_class], side="right")
        first = np.arange(len(reached)) == at.before_group
        newly = reached - np.where(first, 0, np.roll(reached, 1))
        sums = np.bincount(at.group, weights=best * newly, minlength=self._groups)
        return sums.reshape(-1, len(truths)) / len(self._recalls)


def _copies(ranking: _Ranking, most_drawn: int) -> tuple[Integers, Integers, Booleans]:
    """Which detection stands at each place, as which copy, and whether each copy has its own place.

    Detections a, b of one picture with equal scores stand as a b a b where the picture is drawn
    twice, so a weight (a a b b) would be wrong where one of them is a hit. They get `most_drawn`
    places each, in that order; all others one place with a weight.
    """
    columns = (ranking.own_class, ranking.picture, ranking.score)
    same = np.logical_and.reduce([column[1:] == column[:-1] for column in columns])
    group = _sums_before(~same)[: len(ranking.score)]
    with_hit = np.bincount(group, weights=ranking.hits().any(axis=0)) > 0
    tied = (with_hit & (np.bincount(group) > 1))[group]
    copies = np.where(tied, most_drawn, 1)
    source = np.repeat(np.arange(len(group)), copies)
    copy = np.arange(len(source)) - _sums_before(copies)[source]
    order = np.lexsort((source, copy, group[source]))
    return source[order], copy[order], tied[source[order]]


def _sums_before(values: Integers | Booleans) -> Integers:
    """Sums of the first 0, 1 ... N values, [N + 1]."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])


def _truth_counts(evaluation: COCOeval) -> Integers:
    """How many boxes of each class and picture count, [classes, pictures]."""
    rows = [_class_records(evaluation, index) for index in range(len(evaluation.params.catIds))]
    counts = [[0 if one is None else np.count_nonzero(np.equal(one["gtIgnore"], 0)) for one in row] for row in rows]
    return np.array(counts, dtype=np.int64).reshape(len(rows), -1)


def _ranking(evaluation: COCOeval, classes: Integers) -> _Ranking:
    parts = [_class_ranking(evaluation, int(index), place) for place, index in enumerate(classes)]
    parts = parts or [_no_ranking(len(evaluation.params.iouThrs))]
    return _Ranking(
        own_class=np.concatenate([part.own_class for part in parts]),
        picture=np.concatenate([part.picture for part in parts]),
        score=np.concatenate([part.score for part in parts]),
        matched=np.concatenate([part.matched for part in parts], axis=1),
        ignored=np.concatenate([part.ignored for part in parts], axis=1),
    )


def _class_ranking(evaluation: COCOeval, index: int, place: int) -> _Ranking:
    """One class's detections, sorted as pycocotools sorts them: equal scores stay in picture order."""
    found = [(picture, one) for picture, one in enumerate(_class_records(evaluation, index)) if one is not None]
    if not found:
        return _no_ranking(len(evaluation.params.iouThrs))
    scores = np.concatenate([np.asarray(one["dtScores"], dtype=np.float64) for _, one in found])
    pictures = np.concatenate([np.full(np.size(one["dtScores"]), picture) for picture, one in found])
    matched = np.concatenate([np.greater(one["dtMatches"], 0) for _, one in found], axis=1)
    ignored = np.concatenate([np.greater(one["dtIgnore"], 0) for _, one in found], axis=1)
    order = np.argsort(-scores, kind="mergesort")
    return _Ranking(
        own_class=np.full(len(scores), place, dtype=np.int64),
        picture=pictures[order].astype(np.int64),
        score=scores[order],
        matched=matched[:, order],
        ignored=ignored[:, order],
    )


def _no_ranking(levels: int) -> _Ranking:
    none, no_marks = np.empty(0, dtype=np.int64), np.empty((levels, 0), dtype=np.bool_)
    return _Ranking(none, none, np.empty(0), no_marks, no_marks)


def _class_records(evaluation: COCOeval, index: int) -> Sequence[Record | None]:
    """pycocotools' records of one class in all pictures; None where a picture has nothing of it."""
    pictures = len(evaluation.params.imgIds)
    records: list[Record | None] = evaluation.evalImgs[index * pictures : (index + 1) * pictures]
    return records
