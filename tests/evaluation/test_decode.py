from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantrack.datasets.pictures import Letterbox, letterbox
from quantrack.errors import QuantrackError
from quantrack.evaluation.decode import NmsSettings, decode, decode_one2many, decode_one2one

SAME = Letterbox(scale=1.0, left=0, top=0, width=100, height=100)
CATEGORIES = (1, 18, 90)


def one2one(*rows: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(-1, 6)


def one2many(*anchors: tuple[float, ...]) -> NDArray[np.float32]:
    """Each anchor is centre x, centre y, width, height and three class scores."""
    return np.array(anchors, dtype=np.float32).reshape(-1, 7).T


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (333, 500), (64, 48)])
def test_boxes_map_back_through_the_letterbox(size: tuple[int, int]) -> None:
    height, width = size
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    top, bottom, left, right = height // 4, height // 2, width // 8, width // 2
    picture[top:bottom, left:right] = 255
    network, fit = letterbox(picture, 320)
    rows, columns = np.nonzero(network.min(axis=0) > 0.6)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)

    (found,) = decode_one2one(one2one((*map(float, box), 0.9, 1.0)), fit, 7, CATEGORIES)

    expected = (left, top, right - left, bottom - top)
    assert found.xywh == pytest.approx(expected, abs=max(2.0, 2.0 / fit.scale))  # resizing blurs the edges
    assert (found.image_id, found.category_id) == (7, 18)


def test_mapping_is_exact_and_clipped_to_the_picture() -> None:
    fit = Letterbox(scale=0.5, left=0, top=40, width=640, height=480)
    rows = one2one((10.0, 60.0, 110.0, 160.0, 0.9, 0.0), (-8.0, 20.0, 400.0, 300.0, 0.5, 2.0))

    inside, beyond = decode_one2one(rows, fit, 1, CATEGORIES)

    assert inside.xywh == (20.0, 40.0, 200.0, 200.0)
    assert beyond.xywh == (0.0, 0.0, 640.0, 480.0)
    assert [inside.category_id, beyond.category_id] == [1, 90]


def test_corners_in_the_wrong_order_give_an_empty_box() -> None:
    (found,) = decode_one2one(one2one((50.0, 50.0, 40.0, 60.0, 0.9, 0.0)), SAME, 1, CATEGORIES)
    assert found.xywh == (50.0, 50.0, 0.0, 10.0)


def test_one2one_drops_low_scores_and_sorts() -> None:
    rows = one2one((0.0, 0.0, 9.0, 9.0, 0.2, 0.0), (0.0, 0.0, 9.0, 9.0, 0.0005, 0.0), (0.0, 0.0, 9.0, 9.0, 0.8, 0.0))
    found = decode(rows, "one2one", SAME, 1, CATEGORIES)
    assert [detection.score for detection in found] == pytest.approx([0.8, 0.2])


def test_nms_suppresses_within_a_class_only() -> None:
    output = one2many(
        (50.0, 50.0, 20.0, 20.0, 0.9, 0.0, 0.0),
        (51.0, 50.0, 20.0, 20.0, 0.8, 0.0, 0.0),  # IoU 19/21 with the first
        (51.0, 50.0, 20.0, 20.0, 0.0, 0.7, 0.0),
        (10.0, 10.0, 20.0, 20.0, 0.6, 0.0, 0.0),
    )
    found = decode(output, "one2many", SAME, 1, CATEGORIES)
    assert [one.category_id for one in found] == [1, 18, 1]
    assert [one.score for one in found] == pytest.approx([0.9, 0.7, 0.6])
    assert found[0].xywh == (40.0, 40.0, 20.0, 20.0)


def test_one_anchor_may_carry_several_classes() -> None:
    found = decode_one2many(one2many((50.0, 50.0, 20.0, 20.0, 0.9, 0.5, 0.0005)), SAME, 1, CATEGORIES)
    assert [one.category_id for one in found] == [1, 18]


def test_limits_keep_the_best() -> None:
    anchors = [(10.0 * index, 5.0, 4.0, 4.0, 0.1 * index, 0.0, 0.0) for index in range(1, 9)]
    output = one2many(*anchors)
    few = decode_one2many(output, SAME, 1, CATEGORIES, NmsSettings(max_detections=2))
    assert [one.score for one in few] == pytest.approx([0.8, 0.7])
    fewer = decode_one2many(output, SAME, 1, CATEGORIES, NmsSettings(max_candidates=3))
    assert [one.score for one in fewer] == pytest.approx([0.8, 0.7, 0.6])


def test_nothing_found() -> None:
    assert decode(one2many((50.0, 50.0, 20.0, 20.0, 0.0, 0.0, 0.0)), "one2many", SAME, 1, CATEGORIES) == []
    assert decode(one2one(), "one2one", SAME, 1, CATEGORIES) == []


def test_one2many_equals_ultralytics() -> None:
    nms = pytest.importorskip("ultralytics.utils.nms")
    rng = np.random.default_rng(0)
    centres = rng.uniform(20, 80, (4, 400))
    centres[2:] = rng.uniform(10, 30, (2, 400))
    output = np.concatenate((centres, rng.uniform(0, 1, (3, 400)) ** 4)).astype(np.float32)

    found = decode_one2many(output, SAME, 1, CATEGORIES)

    (reference,) = nms.non_max_suppression(
        torch.from_numpy(output.copy())[None], conf_thres=0.001, iou_thres=0.7, multi_label=True, max_det=300
    )
    assert len(found) == len(reference) == 300
    assert [one.score for one in found] == pytest.approx(reference[:, 4].tolist())
    assert [one.category_id for one in found] == [CATEGORIES[int(index)] for index in reference[:, 5]]
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h in (one.xywh for one in found)])
    np.testing.assert_allclose(corners, reference[:, :4].clamp(0, 100).numpy(), atol=1e-4)


def test_boxes_that_reach_outside_the_picture_suppress_none_of_another_class() -> None:
    first, outside, second = (445, 445, 390, 390), (-192, -192, 416, 416), (447, 445, 386, 390)
    scores = (0.9, 0.0, 0.0), (0.0, 0.8, 0.0), (0.7, 0.0, 0.0)
    rows = [(*box, *of) for box, of in zip((first, outside, second), scores, strict=True)]
    found = decode_one2many(one2many(*rows), replace(SAME, width=640, height=640), 1, CATEGORIES)
    assert [(one.category_id, round(one.score, 3)) for one in found] == [(CATEGORIES[0], 0.9), (CATEGORIES[1], 0.8)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_picture(value: float) -> None:
    with pytest.raises(QuantrackError, match="picture 139"):
        decode_one2one(one2one((0.0, 0.0, value, 9.0, 0.9, 0.0)), SAME, 139, CATEGORIES)
    with pytest.raises(QuantrackError, match="picture 139"):
        decode_one2many(one2many((1.0, 1.0, 2.0, 2.0, value, 0.0, 0.0)), SAME, 139, CATEGORIES)


def test_wrong_outputs_are_refused() -> None:
    with pytest.raises(QuantrackError, match="unknown"):
        decode(one2one(), "both", SAME, 1, CATEGORIES)
    with pytest.raises(QuantrackError, match=r"not \[N, 6\]"):
        decode(np.zeros((1, 300, 6), np.float32), "one2one", SAME, 1, CATEGORIES)
    with pytest.raises(QuantrackError, match=r"not \[7, anchors\]"):
        decode(np.zeros((84, 10), np.float32), "one2many", SAME, 1, CATEGORIES)
    with pytest.raises(QuantrackError, match="class 3"):
        decode(one2one((0.0, 0.0, 9.0, 9.0, 0.9, 3.0)), "one2one", SAME, 1, CATEGORIES)
