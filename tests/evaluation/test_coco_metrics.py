from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantrack.datasets.coco import Category, EvaluationSet, Picture, TrueBox, load_evaluation_set
from quantrack.errors import QuantrackError
from quantrack.evaluation.coco_metrics import (
    detections_from_json,
    detections_json,
    drop_points,
    evaluate_coco,
)
from quantrack.evaluation.types import Detection

# Picture 1: two cats (medium, large by box) and a crowd of dogs; picture 2: one dog; no horse at all.
BOXES = (
    TrueBox(1, 17, (10.0, 10.0, 50.0, 50.0), False, 2500.0),
    TrueBox(1, 17, (100.0, 100.0, 120.0, 120.0), False, 14400.0),
    TrueBox(1, 18, (200.0, 10.0, 60.0, 60.0), True, 3600.0),
    TrueBox(2, 18, (20.0, 20.0, 40.0, 80.0), False, 3200.0),
)


def evaluation_set(boxes: tuple[TrueBox, ...] = BOXES) -> EvaluationSet:
    return EvaluationSet(
        root=Path("."),
        annotation_file=Path("instances.json"),
        pictures=(Picture(1, Path("1.jpg"), 300, 300), Picture(2, Path("2.jpg"), 300, 300)),
        categories=(Category(17, "cat"), Category(18, "dog"), Category(19, "horse")),
        boxes=boxes,
        digest="0",
    )


def perfect(boxes: tuple[TrueBox, ...] = BOXES) -> list[Detection]:
    return [Detection(box.image_id, box.category_id, box.xywh, 0.9) for box in boxes if not box.crowd]


def test_perfect_detections_score_one(capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate_coco(evaluation_set(), perfect())

    assert result.metrics == pytest.approx(
        dict.fromkeys(("mAP50-95", "mAP50", "mAP75", "mAP50-95_medium", "mAP50-95_large", "AR100"), 1.0)
    )
    assert [(one.name, one.boxes) for one in result.classes] == [("cat", 2), ("dog", 1), ("horse", 0)]
    assert [one.ap50_95 for one in result.classes] == [pytest.approx(1.0), pytest.approx(1.0), None]
    assert result.recall_thresholds.shape == result.precision_at_50.shape == (101,)
    np.testing.assert_allclose(result.precision_at_75, 1.0)
    assert capsys.readouterr().out == ""


def test_no_detections_score_zero() -> None:
    result = evaluate_coco(evaluation_set(), [])
    assert set(result.metrics.values()) == {0.0}
    assert "mAP50-95" in result.metrics
    assert "mAP50-95_small" not in result.metrics
    assert [one.ap50 for one in result.classes] == [0.0, 0.0, None]


def test_no_ground_truth_measures_nothing() -> None:
    result = evaluate_coco(evaluation_set(()), perfect())
    assert result.metrics == {}
    assert [one.ap50_95 for one in result.classes] == [None, None, None]
    np.testing.assert_array_equal(result.precision_at_50, np.zeros(101))


def test_half_found_by_hand() -> None:
    # One of two cats found: precision 1 at recalls 0..0.50 (51 of 101); the dog is missed.
    result = evaluate_coco(evaluation_set(), perfect()[:1])
    assert result.classes[0].ap50_95 == pytest.approx(51 / 101)
    assert result.metrics["mAP50-95"] == pytest.approx(51 / 202)
    assert result.metrics["AR100"] == pytest.approx(0.25)


def test_size_ranges_go_by_the_annotated_area() -> None:
    # The box is medium, its mask small.
    boxes = (TrueBox(1, 17, (10.0, 10.0, 50.0, 50.0), False, 900.0),)
    metrics = evaluate_coco(evaluation_set(boxes), perfect(boxes)).metrics
    assert metrics["mAP50-95_small"] == pytest.approx(1.0)
    assert "mAP50-95_medium" not in metrics


def test_detections_elsewhere_are_refused() -> None:
    with pytest.raises(QuantrackError, match="picture 3"):
        evaluate_coco(evaluation_set(), [Detection(3, 17, (0.0, 0.0, 1.0, 1.0), 0.5)])


def write_coco(root: Path) -> None:
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 300, "height": 300} for number in (1, 2)]
    for image in images:
        (root / "val2017" / str(image["file_name"])).write_bytes(
            cv2.imencode(".jpg", np.zeros((300, 300), np.uint8))[1]
        )
    rows = [
        {"id": index, "image_id": box.image_id, "category_id": box.category_id, "bbox": list(box.xywh)}
        | {"area": box.area, "iscrowd": int(box.crowd)}
        for index, box in enumerate(BOXES, start=1)
    ]
    categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    content = {"images": images, "annotations": rows, "categories": categories}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content), encoding="utf-8")


def test_equals_pycocotools_run_by_hand(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    write_coco(tmp_path)
    loaded = load_evaluation_set(tmp_path, 0)
    detections = [
        Detection(1, 17, (12.0, 9.0, 52.0, 47.0), 0.8),
        Detection(1, 17, (110.0, 95.0, 118.0, 130.0), 0.95),
        Detection(1, 17, (0.0, 200.0, 30.0, 30.0), 0.85),
        Detection(1, 18, (205.0, 12.0, 40.0, 50.0), 0.7),
        Detection(2, 18, (25.0, 24.0, 40.0, 80.0), 0.6),
        Detection(2, 17, (25.0, 24.0, 40.0, 80.0), 0.3),
    ]
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "annotations/instances_val2017.json"))
        reference = COCOeval(truth, truth.loadRes(detections_json(detections)), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()

    result = evaluate_coco(loaded, detections)

    names = ("mAP50-95", "mAP50", "mAP75", "mAP50-95_medium", "mAP50-95_large")
    assert [result.metrics[name] for name in names] == [reference.stats[index] for index in (0, 1, 2, 4, 5)]
    assert result.metrics["AR100"] == reference.stats[8]
    assert 0.0 < result.metrics["mAP50-95"] < 1.0
    assert reference.stats[3] == -1
    assert "mAP50-95_small" not in result.metrics
    dog = reference.eval["precision"][:, :, 1, 0, 2]
    assert (result.classes[1].ap50_95, result.classes[1].ap50) == (dog.mean(), dog[0].mean())


def test_detections_survive_json() -> None:
    detections = [Detection(1, 17, (1.25, 2.0, 3.0, 1 / 3), 0.1234567891234)]
    assert detections_from_json(json.loads(json.dumps(detections_json(detections)))) == detections
    assert detections_from_json([]) == []


@pytest.mark.parametrize("content", [{}, [1], [{"image_id": 1}], [{"image_id": 1, "bbox": [1, 2]}]])
def test_other_json_is_refused(content: object) -> None:
    with pytest.raises(QuantrackError, match="run the evaluation again"):
        detections_from_json(content)


def test_drop_points() -> None:
    assert drop_points(0.6022, 0.5932) == pytest.approx(0.9)
    assert drop_points(0.25, 0.5) == -25.0
