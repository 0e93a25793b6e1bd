from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from quantrack.evaluation.plots import per_class_ap_figure, placement_figure, precision_recall_figure
from quantrack.evaluation.types import ClassResult, CocoResult
from quantrack.runtime.placement import OperatorUse, Placement


def coco_result(classes: int) -> CocoResult:
    recall = np.linspace(0, 1, 101)
    rows = [ClassResult(f"class {index}", index / 100, index / 90, index) for index in range(classes)]
    return CocoResult(
        metrics={"mAP50-95": 0.4, "mAP50": 0.6},
        classes=(*rows, ClassResult("unseen", None, None, 0)),
        recall_thresholds=recall,
        precision_at_50=1 - recall,
        precision_at_75=(1 - recall) / 2,
    )


def saved_shape(figure: Figure, path: Path) -> tuple[int, ...]:
    figure.savefig(path)
    picture = cv2.imread(str(path))
    assert picture is not None
    return tuple(int(side) for side in picture.shape)


def test_precision_recall(tmp_path: Path) -> None:
    result = coco_result(3)
    figure = precision_recall_figure(result, "W8A8")
    (axes,) = figure.axes
    fifty, seventy_five = axes.lines
    np.testing.assert_array_equal(fifty.get_ydata(), result.precision_at_50)
    np.testing.assert_array_equal(seventy_five.get_ydata(), result.precision_at_75)
    assert [str(line.get_label()) for line in axes.lines] == ["IoU 0.50   mAP50 0.600", "IoU 0.75"]
    assert axes.get_title(loc="left") == "W8A8"
    assert saved_shape(figure, tmp_path / "pr.png") == (576, 768, 3)


def test_classes_are_sorted_and_only_those_measured() -> None:
    (axes,) = per_class_ap_figure(coco_result(3), "W8A8").axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["class 2 (2)", "class 1 (1)", "class 0 (0)"]
    top, bottom = axes.get_ylim()[::-1]
    assert top < bottom  # the first, best class is on top


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    rows = (ClassResult("$5 bill_{$", 0.5, 0.6, 1), ClassResult("cost_$_{x$", 0.4, 0.6, 1))
    result = replace(coco_result(1), classes=rows)
    figure = per_class_ap_figure(result, "val$_3$")
    saved_shape(figure, tmp_path / "classes.png")
    (axes,) = figure.axes
    assert {label._preprocess_math(label.get_text()) for label in axes.get_yticklabels()} == {
        ("$5 bill_{$ (1)", False),
        ("cost_$_{x$ (1)", False),
    }


@pytest.mark.parametrize("classes", [0, 1, 80])
def test_the_figure_grows_with_the_classes(classes: int, tmp_path: Path) -> None:
    figure = per_class_ap_figure(coco_result(classes), "W8A8")
    height, width, _ = saved_shape(figure, tmp_path / "classes.png")
    assert width == 864
    assert height == pytest.approx(120 * (1.5 + 0.19 * max(classes, 3)), abs=1)


def test_no_global_figures_are_left() -> None:
    import matplotlib.pyplot as plt

    precision_recall_figure(coco_result(2), "a")
    assert plt.get_fignums() == []


def test_an_operator_on_two_providers_has_two_bars() -> None:
    uses = (
        OperatorUse("Conv", "CUDAExecutionProvider", 3, 3, 2.0),
        OperatorUse("Conv", "CPUExecutionProvider", 3, 3, 1.0),
        OperatorUse("Add", "CPUExecutionProvider", 1, 1, 0.5),
    )
    (axes,) = placement_figure(Placement(uses)).axes
    widths = {bar.get_y(): bar.get_width() for bar in axes.patches if bar.get_width()}
    assert list(widths.values()) == [0.5, 1.0, 2.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Add x 1", "Conv x 3", "Conv x 3"]
