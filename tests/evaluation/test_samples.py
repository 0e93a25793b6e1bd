from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from quantrack.datasets.coco import Category, EvaluationSet, Picture, TrueBox
from quantrack.errors import QuantrackError
from quantrack.evaluation.samples import (
    GAP,
    TITLE_HEIGHT,
    choose_samples,
    class_colour,
    draw_detections,
    sample_picture,
)
from quantrack.evaluation.types import Detection

CATEGORIES = (Category(1, "person"), Category(18, "dog"))
TRUTH = (
    TrueBox(5, 1, (20.0, 30.0, 40.0, 50.0), False, 2000.0),
    TrueBox(6, 18, (0.0, 0.0, 9.0, 9.0), False, 81.0),
)


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    path = tmp_path / "5.png"
    pixels = np.zeros((120, 160, 3), dtype=np.uint8)
    pixels[:, :, 0] = 200  # BGR: blue
    cv2.imwrite(str(path), pixels)
    return Picture(5, path, 160, 120)


def has_colour(panel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((panel == np.array(colour, dtype=np.uint8)).all(axis=2).any())


def test_three_panels_side_by_side(picture: Picture) -> None:
    detection = Detection(5, 18, (20.0, 30.0, 40.0, 50.0), 0.9)
    drawn = sample_picture(picture, TRUTH, [detection], [], CATEGORIES)

    assert drawn.shape == (480 + TITLE_HEIGHT, 3 * 640 + 2 * GAP, 3)
    assert drawn.dtype == np.uint8
    truth, floats, quantized = (drawn[:, start : start + 640] for start in (0, 640 + GAP, 2 * (640 + GAP)))
    assert has_colour(truth, class_colour(1))
    assert not has_colour(truth, class_colour(18))
    assert has_colour(floats, class_colour(18))
    assert not has_colour(floats, class_colour(1))
    assert not has_colour(quantized, class_colour(18))
    assert tuple(drawn[-1, -1]) == (0, 0, 200)  # RGB


def test_a_baseline_has_two_panels(picture: Picture) -> None:
    drawn = sample_picture(picture, TRUTH, None, [], CATEGORIES)
    assert drawn.shape == (480 + TITLE_HEIGHT, 2 * 640 + GAP, 3)


def test_weak_detections_are_left_out(picture: Picture) -> None:
    weak = Detection(5, 18, (20.0, 30.0, 40.0, 50.0), 0.2)
    assert not has_colour(sample_picture(picture, (), None, [weak], CATEGORIES), class_colour(18))
    assert has_colour(sample_picture(picture, (), None, [weak], CATEGORIES, 0.1), class_colour(18))


@pytest.mark.parametrize("xywh", [(0.0, 0.0, 160.0, 120.0), (158.0, 118.0, 2.0, 2.0), (5.0, 0.0, 0.0, 0.0)])
def test_boxes_at_the_edges_are_drawn(picture: Picture, xywh: tuple[float, float, float, float]) -> None:
    drawn = sample_picture(picture, (), None, [Detection(5, 7, xywh, 0.9)], CATEGORIES)
    assert has_colour(drawn, class_colour(7))


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match=r"gone\.jpg"):
        sample_picture(Picture(1, tmp_path / "gone.jpg", 9, 9), (), None, [], CATEGORIES)


def many_pictures(annotated: set[int]) -> EvaluationSet:
    pictures = tuple(Picture(number, Path(f"{number}.jpg"), 9, 9) for number in range(10))
    boxes = tuple(TrueBox(number, 1, (0.0, 0.0, 5.0, 5.0), False, 25.0) for number in sorted(annotated))
    return EvaluationSet(Path("."), Path("a.json"), pictures, CATEGORIES, boxes, "0")


def test_samples_are_evenly_spaced_over_annotated_pictures() -> None:
    chosen = choose_samples(many_pictures({0, 2, 3, 5, 7, 9}), 3)
    assert [picture.id for picture in chosen] == [0, 3, 7]


def test_fewer_pictures_than_samples() -> None:
    assert [picture.id for picture in choose_samples(many_pictures({4, 8}))] == [4, 8]
    assert choose_samples(many_pictures(set())) == ()


def test_boxes_are_drawn_in_the_pictures_own_size() -> None:
    for width, line in ((320, 2), (3200, 10)):
        picture = np.full((width // 2, width, 3), 128, dtype=np.uint8)
        box = Detection(0, 7, (width * 0.25, width * 0.125, width * 0.5, width * 0.25), 0.8)
        drawn = draw_detections(picture, [box], {7: "cat"})
        assert drawn.shape == picture.shape
        assert (picture == 128).all()
        column = drawn[width // 4, : width // 2]  # across the box's left edge, below its label
        coloured = np.flatnonzero((column == class_colour(7)).all(axis=1))
        assert abs(coloured.mean() - width * 0.25) <= 1
        assert line - 1 <= len(coloured) <= line + 1
        np.testing.assert_array_equal(drawn, draw_detections(picture, [box], {7: "cat"}))
