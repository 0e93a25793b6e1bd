"""The ruler that recipes are compared by."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from quantrack.datasets.coco import Category, EvaluationSet, Picture, TrueBox
from quantrack.evaluation.types import Detection

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Picture(1, Path("1.jpg"), 60, 40)
BOX = TrueBox(1, 1, (10.0, 5.0, 20.0, 8.0), crowd=False, area=160.0)
PICTURES = EvaluationSet(ROOT, ROOT, (PICTURE,), (Category(1, "a"), Category(2, "b")), (BOX,), "digest")


@pytest.fixture
def six_views(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import six_views as module

    return module


def test_boxes_are_where_the_view_shows_them(six_views: ModuleType) -> None:
    drawn = np.zeros((PICTURE.height, PICTURE.width, 3), np.uint8)
    drawn[5:13, 10:30] = 255
    assert len({str(view) for view in six_views.VIEWS}) == 6
    for view in six_views.VIEWS:
        shown = view.of(drawn)
        assert max(shown.shape[:2]) == pytest.approx(PICTURE.width / view.size, abs=1)
        x, y, width, height = (int(side) for side in view.of_set(PICTURES).boxes[0].xywh)
        assert shown[y : y + height, x : x + width].min() == 255
        assert (shown == 255).sum() == 3 * width * height


def test_what_agrees_with_itself(six_views: ModuleType) -> None:
    found = [
        Detection(1, 1, (10.0, 5.0, 20.0, 8.0), 0.9),
        Detection(1, 1, (11.0, 5.0, 20.0, 8.0), 0.4),  # the same object once more
        Detection(1, 2, (10.0, 5.0, 20.0, 8.0), 0.5),
    ]
    assert six_views.agreement(PICTURES, found, found) == 1
    assert six_views.agreement(PICTURES, found, [replace(one, category_id=3 - one.category_id) for one in found]) < 1
    assert six_views.logit_shifts(found, found) == six_views.LogitShifts(0.0, 1.0)
    assert six_views.logit_shifts(found, found[1:2]) == six_views.LogitShifts(0.0, 0.5)
    assert six_views.logit_shifts(found, []) == six_views.LogitShifts(None, 0.0)
    lower = [replace(found[0], score=0.5), found[2]]
    assert six_views.logit_shifts(found, lower).scatter == pytest.approx(six_views.logit(0.9) / 2)


@pytest.mark.parametrize(("pictures", "folder", "ids"), [("evaluation", "val2017", 4), ("development", "train2017", 3)])
def test_choices_are_made_on_other_pictures(
    six_views: ModuleType, coco_root: Path, monkeypatch: pytest.MonkeyPatch, pictures: str, folder: str, ids: int
) -> None:
    annotations = coco_root / "annotations"
    val = json.loads((annotations / "instances_val2017.json").read_text())
    (annotations / "instances_train2017.json").write_text(json.dumps(val))
    calibrated = coco_root / "list.txt"
    calibrated.write_text(f"./train2017/{val['images'][0]['file_name']}\n")
    monkeypatch.setattr("ablation.CALIBRATION", calibrated)
    monkeypatch.setattr(six_views, "EVALUATION_PICTURES", 4)
    with six_views.loaded(six_views.Pictures(pictures), coco_root) as shown:
        assert {picture.path.resolve().parent.name for picture in shown.pictures} == {folder}
        assert len(shown.pictures) == ids
        assert (val["images"][0]["id"] in {picture.id for picture in shown.pictures}) == (pictures == "evaluation")
