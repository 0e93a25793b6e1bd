"""The bootstrap's mAP against pycocotools on pictures that really are there several times."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from quantrack.datasets.coco import Category, EvaluationSet, Picture, TrueBox, load_evaluation_set
from quantrack.errors import UsageError
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


@pytest.mark.parametrize("seed", range(12))
def test_weighing_pictures_is_repeating_them(seed: int) -> None:
    case, detections = random_case(seed)
    times = np.bincount(np.random.default_rng(seed).integers(9, size=9), minlength=9)
    expected = evaluate_coco(*repeated(case, detections, times.tolist())).metrics["mAP50-95"]
    assert MatchedDetections(case, detections).mean_ap(times) == pytest.approx(expected, abs=1e-9)


def test_each_picture_once_is_the_plain_metric() -> None:
    case, detections = random_case(3)
    once = np.ones(len(case.pictures), dtype=np.int64)
    expected = evaluate_coco(case, detections).metrics["mAP50-95"]
    assert MatchedDetections(case, detections).mean_ap(once) == pytest.approx(expected, abs=1e-12)
    assert MatchedDetections(case, []).mean_ap(once) == 0.0
    assert MatchedDetections(case, detections).mean_ap(0 * once) == 0.0


def test_the_interval_holds_the_drop_and_is_repeatable() -> None:
    case, detections = random_case(5, pictures=40)
    worse = [replace(one, score=one.score * (0.2 if index % 3 else 1)) for index, one in enumerate(detections)][::2]
    settings = BootstrapSettings(resamples=200)
    interval = paired_drop_interval(case, detections, worse, settings)
    drop = drop_points(*(evaluate_coco(case, found).metrics["mAP50-95"] for found in (detections, worse)))
    assert interval.low < drop < interval.high
    assert interval == paired_drop_interval(case, detections, worse, settings)
    swapped = paired_drop_interval(case, worse, detections, settings)
    assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low))


def test_the_same_detections_differ_by_nothing() -> None:
    case, detections = random_case(1)
    interval = paired_drop_interval(case, detections, detections, BootstrapSettings(resamples=20))
    assert (interval.low, interval.high, interval.pictures) == (0.0, 0.0, 9)
    assert interval.metrics() == {"mAP50-95_drop_ci_low": 0.0, "mAP50-95_drop_ci_high": 0.0}


@pytest.mark.parametrize("settings", [{"resamples": 0}, {"confidence": 1.0}])
def test_settings_refuse_nonsense(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
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
