"""The bootstrap's mAP against pycocotools on pictures that really are there several times."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from quantrack.datasets.coco import Category, EvaluationSet, Picture, TrueBox, load_evaluation_set
from quantrack.errors import QuantrackError, UsageError
from quantrack.evaluation.bootstrap import BootstrapSettings, MatchedDetections, paired_drop_interval
from quantrack.evaluation.coco_metrics import drop_points, evaluate_coco
from quantrack.evaluation.types import Detection

Detections = list[Detection]


def random_case(seed: int, pictures: int = 9, classes: int = 4) -> tuple[EvaluationSet, Detections]:
    """Boxes, crowds among them, and detections near and far; some pictures and classes are empty."""
    draw = np.random.default_rng(seed)
    boxes, detections = [], []
    for picture in range(1, pictures):
        for _ in range(int(draw.integers(0, 6))):
            category = int(draw.integers(1, classes))
            x, y, w, h = draw.uniform(5, 100, 4)
            boxes.append(TrueBox(picture, category, (x, y, w, h), bool(draw.random() < 0.15), w * h))
            for _ in range(int(draw.integers(0, 3))):
                near = tuple(float(v) for v in np.array([x, y, w, h]) * draw.normal(1, 0.12, 4))
                detections.append(Detection(picture, category, near, float(draw.random())))  # type: ignore[arg-type]
        for _ in range(int(draw.integers(0, 4))):
            far = tuple(float(v) for v in draw.uniform(5, 100, 4))
            detections.append(Detection(picture, int(draw.integers(1, classes + 1)), far, float(draw.random())))  # type: ignore[arg-type]
    listed = tuple(Picture(index, Path(f"{index}.jpg"), 300, 300) for index in range(1, pictures + 1))
    categories = tuple(Category(index, str(index)) for index in range(1, classes + 1))
    return EvaluationSet(Path("."), Path("instances.json"), listed, categories, tuple(boxes), "0"), detections


def repeated(case: EvaluationSet, detections: Detections, times: list[int]) -> tuple[EvaluationSet, Detections]:
    """Every picture as often as it was drawn, under ids of its own."""
    pictures, boxes, found = [], [], []
    for picture, count in zip(case.pictures, times, strict=True):
        for _ in range(count):
            new = len(pictures) + 1
            pictures.append(replace(picture, id=new))
            boxes += [replace(box, image_id=new) for box in case.boxes if box.image_id == picture.id]
            found += [replace(one, image_id=new) for one in detections if one.image_id == picture.id]
    return replace(case, pictures=tuple(pictures), boxes=tuple(boxes)), found


@pytest.mark.parametrize(("pictures", "known"), [(1, False), (4, False), (5, True)])
def test_few_pictures_have_no_interval(pictures: int, known: bool) -> None:
    """Of one every resample is the same, so its interval would be a point."""
    case, detections = random_case(3, pictures)
    metrics = paired_drop_interval(case, detections, coarse(detections, 2), BootstrapSettings(20)).metrics()
    assert bool(metrics) == known


def expected_ap(case: EvaluationSet, detections: Detections, times: list[int]) -> float:
    """pycocotools' own word; no metric, as 0, where no truth was drawn."""
    return evaluate_coco(*repeated(case, detections, times)).metrics.get("mAP50-95", 0.0)


def coarse(detections: Detections, levels: int) -> Detections:
    """Scores on a few levels, as low-bit outputs have: many ties within and between pictures."""
    return [replace(one, score=round(one.score * levels) / levels) for one in detections]


@pytest.mark.parametrize("levels", [1, 3, 10, None], ids=lambda levels: f"{levels}-scores")
@pytest.mark.parametrize("seed", range(12))
def test_weighing_pictures_is_repeating_them(seed: int, levels: int | None) -> None:
    case, detections = random_case(seed)
    if levels:
        detections = coarse(detections, levels)
    times = np.bincount(np.random.default_rng(seed).integers(9, size=9), minlength=9)
    expected = expected_ap(case, detections, times.tolist())
    assert MatchedDetections(case, detections, most_drawn=9).mean_ap(times) == pytest.approx(expected, abs=1e-12)


def test_the_random_cases_hold_what_makes_it_hard() -> None:
    cases = [random_case(seed) for seed in range(12)]
    assert any(box.crowd for case, _ in cases for box in case.boxes)
    assert all({picture.id for picture in case.pictures} > {box.image_id for box in case.boxes} for case, _ in cases)
    assert all(len(case.categories) > len({box.category_id for box in case.boxes}) for case, _ in cases)


def test_equal_scores_in_a_picture_drawn_three_times_by_hand() -> None:
    # A miss before a hit, tied: copies stand as - + - + - +, precision 1/2 throughout. Were they
    # weighted to - - - + + +, precision would fall short of 1/2 before the last recall.
    boxes = (TrueBox(1, 1, (0.0, 0.0, 10.0, 10.0), False, 100.0),)
    case = replace(random_case(0)[0], boxes=boxes)
    hit, miss = Detection(1, 1, (0.0, 0.0, 10.0, 10.0), 0.5), Detection(1, 1, (50.0, 50.0, 10.0, 10.0), 0.5)
    thrice = np.array([3] + [0] * 8)
    assert MatchedDetections(case, [miss, hit], 3).mean_ap(thrice) == pytest.approx(0.5)
    # A hit first: + - + - + -, where recall 1/3 has precision 1, 2/3 has 2/3 and 1 has 3/5.
    by_hand = (34 * 1 + 33 * 2 / 3 + 34 * 3 / 5) / 101
    assert MatchedDetections(case, [hit, miss], 3).mean_ap(thrice) == pytest.approx(by_hand)
    assert expected_ap(case, [hit, miss], thrice.tolist()) == pytest.approx(by_hand)


def test_each_picture_once_is_the_plain_metric() -> None:
    case, detections = random_case(3)
    once = np.ones(len(case.pictures), dtype=np.int64)
    expected = evaluate_coco(case, detections).metrics["mAP50-95"]
    assert MatchedDetections(case, detections, 1).mean_ap(once) == pytest.approx(expected, abs=1e-12)
    assert MatchedDetections(case, [], 1).mean_ap(once) == 0.0
    assert MatchedDetections(case, detections, 1).mean_ap(0 * once) == 0.0
    assert MatchedDetections(replace(case, boxes=()), detections, 1).mean_ap(once) == 0.0


def test_a_picture_drawn_more_often_than_announced_is_refused() -> None:
    case, detections = random_case(3)
    with pytest.raises(ValueError, match="drawn 2 times; at most 1"):
        MatchedDetections(case, detections, most_drawn=1).mean_ap(np.full(9, 2))


def test_resamples_are_paired_and_drawn_with_replacement() -> None:
    # The brute force in full: the same draws for both sides, pictures really there several times.
    case, detections = random_case(2)
    sides = coarse(detections, 4), coarse(detections, 4)[::2]
    settings = BootstrapSettings(resamples=25, confidence=0.8, seed=7)
    generator = np.random.default_rng(7)
    draws = [np.bincount(generator.integers(9, size=9), minlength=9).tolist() for _ in range(25)]
    drops = [drop_points(*(expected_ap(case, side, times) for side in sides)) for times in draws]
    interval = paired_drop_interval(case, *sides, settings)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(drops, [0.1, 0.9])), abs=1e-9)
    assert (interval.resamples, interval.pictures) == (25, 9)


def test_the_interval_holds_the_drop_and_is_repeatable() -> None:
    case, detections = random_case(5, pictures=40)
    worse = [replace(one, score=one.score * (0.2 if index % 3 else 1)) for index, one in enumerate(detections)][::2]
    settings = BootstrapSettings(resamples=200)
    interval = paired_drop_interval(case, detections, worse, settings)
    drop = drop_points(*(evaluate_coco(case, found).metrics["mAP50-95"] for found in (detections, worse)))
    assert interval.low < drop < interval.high
    assert interval == paired_drop_interval(case, detections, worse, settings)
    assert interval != paired_drop_interval(case, detections, worse, replace(settings, seed=1))
    narrow = paired_drop_interval(case, detections, worse, replace(settings, confidence=0.5))
    assert interval.low < narrow.low < narrow.high < interval.high
    swapped = paired_drop_interval(case, worse, detections, settings)
    assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low))


def test_the_same_detections_differ_by_nothing() -> None:
    case, detections = random_case(1)
    interval = paired_drop_interval(case, detections, detections, BootstrapSettings(resamples=20))
    assert (interval.low, interval.high, interval.pictures) == (0.0, 0.0, 9)
    assert interval.metrics() == {"mAP50-95_drop_ci_low": 0.0, "mAP50-95_drop_ci_high": 0.0}


def test_detections_outside_the_set_are_refused() -> None:
    case, detections = random_case(1)
    with pytest.raises(QuantrackError, match="picture 99"):
        paired_drop_interval(case, detections, [replace(detections[0], image_id=99)])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"resamples": 0}, "resamples=0"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"confidence": 0.0}, "confidence=0.0"),
        ({"confidence": float("nan")}, "confidence=nan"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_refuse_nonsense(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        BootstrapSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.real
def test_a_thousand_resamples_of_a_hundred_real_pictures_take_seconds(real_inputs: Path) -> None:
    case = load_evaluation_set(real_inputs / "coco2017", 100)
    draw = np.random.default_rng(0)
    found = []
    for picture in case.pictures:
        for box in [box for box in case.boxes if box.image_id == picture.id]:
            near = tuple(float(v) for v in np.array(box.xywh) * draw.normal(1, 0.05, 4))
            found.append(Detection(picture.id, box.category_id, near, float(draw.random())))  # type: ignore[arg-type]
        for _ in range(250):
            far = tuple(float(v) for v in draw.uniform(5, 300, 4))
            category = case.categories[int(draw.integers(80))].id
            found.append(Detection(picture.id, category, far, float(draw.random()) * 0.5))  # type: ignore[arg-type]
    start = perf_counter()
    interval = paired_drop_interval(case, found, found[::2] + found[1::4])
    assert perf_counter() - start < 30
    assert interval.low < interval.high
