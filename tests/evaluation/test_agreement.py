"""A detector beside another one whose detections are the truth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantrack.datasets.coco import Category, EvaluationSet, Picture, TrueBox
from quantrack.errors import QuantrackError
from quantrack.evaluation.agreement import agreement
from quantrack.evaluation.types import Detection

PICTURES = tuple(Picture(number, Path(f"{number}.jpg"), 640, 480) for number in (1, 2))
BOX = TrueBox(1, 1, (10.0, 5.0, 20.0, 8.0), crowd=False, area=160.0)
SET = EvaluationSet(Path(), Path("boxes.json"), PICTURES, (Category(1, "a"), Category(2, "b")), (BOX,), "digest")
EXPECTED = [
    Detection(1, 1, (10.0, 5.0, 20.0, 8.0), 0.9),
    Detection(1, 2, (11.0, 5.0, 20.0, 8.0), 0.5),  # nearly the same box, of another class
    Detection(2, 1, (300.0, 200.0, 100.0, 80.0), 0.3),
    Detection(2, 2, (300.0, 200.0, 100.0, 80.0), 0.2),  # not sure
]


def test_one_that_is_the_same() -> None:
    assert agreement(SET, EXPECTED, EXPECTED) == pytest.approx(1)


def test_labels_are_not_looked_at() -> None:
    assert agreement(replace(SET, boxes=()), EXPECTED, EXPECTED) == pytest.approx(1)


def test_each_sure_object_counts_alike() -> None:
    without = [agreement(SET, EXPECTED, EXPECTED[:place] + EXPECTED[place + 1 :]) for place in range(4)]
    # two of three objects are found: pycocotools averages over 101 recalls, of which 67 are reached
    assert without == pytest.approx([67 / 101, 67 / 101, 67 / 101, 1])


def test_a_crowded_picture_agrees_with_itself() -> None:
    found = [Detection(1, 1 + place % 2, (4.0 * place, 5.0, 3.0, 8.0), 0.3 + place / 1000) for place in range(150)]
    assert agreement(SET, found, found) == pytest.approx(1)
    assert agreement(SET, found, found[50:]) == pytest.approx(1)  # the 100 surest
    assert agreement(SET, found, found[:50]) == 0


def test_a_detection_of_another_class_is_none() -> None:
    swapped = [replace(one, category_id=3 - one.category_id) for one in EXPECTED]
    found = agreement(SET, EXPECTED[2:], swapped[2:])
    assert found == pytest.approx(1 / 2)  # of the right class there is one more, that comes second


def test_boxes_count_by_how_far_they_are_off() -> None:
    def moved(pixels: float) -> list[Detection]:
        return [replace(one, xywh=(one.xywh[0] + pixels, *one.xywh[1:])) for one in EXPECTED]

    found = [agreement(SET, EXPECTED, moved(pixels)) for pixels in (0, 1, 3, 6)]
    assert all(np.diff(found) < 0)


@pytest.mark.parametrize("expected", [[], EXPECTED[3:]])
def test_nothing_sure_is_nothing_to_agree_with(expected: list[Detection]) -> None:
    assert agreement(SET, expected, EXPECTED) is None


def test_nothing_found() -> None:
    assert agreement(SET, EXPECTED, []) == 0


def test_a_picture_of_another_set_is_refused() -> None:
    with pytest.raises(QuantrackError, match="picture 99"):
        agreement(SET, EXPECTED, [replace(EXPECTED[0], image_id=99)])
