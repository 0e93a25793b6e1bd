"""Groups that may be compared, labels, trade-offs, tables, and the report that stands alone."""

import io
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from quantrack.comparison.plots import class_drop_figure, pareto_figure, ranges_figure
from quantrack.comparison.report import report_html
from quantrack.comparison.runs import (
    LATENCY,
    SIZE,
    Circumstances,
    ClassScore,
    ComparedRun,
    Sample,
    comparable_groups,
    labels,
    pareto_front,
)
from quantrack.comparison.table import cells, marks, summary_markdown, table_columns

HERE = Circumstances("val2017-100", "d" * 64, "one2one", "640", "cpu", "a processor")
PIXELS = np.zeros((20, 30, 3), dtype=np.uint8)


def run(
    mode: str, accuracy: float, latency: float, size: float, recipe: str = "default", **further: float
) -> ComparedRun:
    return ComparedRun(
        f"{mode}-{recipe}-0123456789", f"ptq-{mode}", mode, recipe, "yolov10n", HERE,
        {"mAP50-95": accuracy, LATENCY: latency, SIZE: size, **further},
        (ClassScore("person", accuracy, 30), ClassScore("<cat>", accuracy + 0.1, 2)),
        {"model.0": (0.0, 1.0)} if mode.endswith("a8") else {},
        (Sample("1.png", PIXELS, PIXELS),),
    )  # fmt: skip


FLOAT = run("fp32", 0.467, 30.0, 9.5)
RUNS = (
    run("w4a8", 0.448, 56.0, 2.8, **{"mAP50-95_drop": 1.9, "mAP50-95_drop_ci_low": 0.7, "mAP50-95_drop_ci_high": 4.1}),
    FLOAT,
    run("w8a8", 0.460, 54.0, 2.8),
    run("w4a8", 0.30, 57.0, 2.9, "naive"),
)


def test_the_best_accuracy_comes_first_and_labels_tell_runs_apart() -> None:
    (group,) = comparable_groups(RUNS)
    assert [one.label for one in group.runs] == ["float32", "W8A8", "W4A8 default", "W4A8 naive"]
    assert all(group.float_run(one) is group.runs[0] for one in group.runs)


def test_class_names_with_dollars_are_drawn() -> None:
    classes = (ClassScore("$5 bill_{$", 0.5, 3), ClassScore("cost_$_{x$", 0.4, 2))
    (group,) = comparable_groups(tuple(replace(one, classes=classes) for one in RUNS))
    figure = class_drop_figure(group)
    assert figure is not None
    figure.savefig(io.BytesIO())


def test_timings_beside_others_are_in_doubt() -> None:
    busy = replace(RUNS[0], metrics={**RUNS[0].metrics, "busy_cores_of_others": 1.53})
    calm = replace(RUNS[2], metrics={**RUNS[2].metrics, "busy_cores_of_others": 0.1})
    groups = comparable_groups((busy, calm, FLOAT))
    said = "1 of 3 runs were timed while other processes kept up to 1.5 cores busy: measure again"
    assert said in summary_markdown(groups, "title")
    assert said in report_html(groups, "title", "Made today")
    assert "busy" not in summary_markdown(comparable_groups((calm, FLOAT)), "title")


def test_a_checkpoint_of_the_same_name_is_another() -> None:
    other = replace(RUNS[0], model_digest="e" * 64, run_id="another")
    (group,) = comparable_groups((*RUNS, other))
    found = {one.run_id: group.float_run(one) for one in group.runs}
    assert found["another"] is None
    assert found[RUNS[0].run_id] is not None


def test_equal_runs_are_told_apart_by_bits_and_at_last_by_id() -> None:
    same = replace(RUNS[0], run_id="abcdefghij", metrics={**RUNS[0].metrics, "weight_bits_avg": 4.5})
    assert [one.label for one in labels((RUNS[0], same))] == ["W4A8 default", "W4A8 default 4.50 bits"]
    twins = labels((same, replace(same, run_id="0123456789")))
    assert [one.label for one in twins] == [
        f"W4A8 default 4.50 bits yolov10n {name}" for name in ("abcdefgh", "01234567")
    ]


@pytest.mark.parametrize("name", ["evaluation_digest", "head", "imgsz", "provider", "device_name"])
def test_runs_of_other_circumstances_stand_apart(name: str) -> None:
    other = replace(RUNS[0], circumstances=replace(HERE, **{name: "another"}))
    groups = comparable_groups((*RUNS, other))
    assert [len(group.runs) for group in groups] == [4, 1]
    assert "must not be compared" in summary_markdown(groups, "title")
    assert table_columns(groups)["group"] == [1, 1, 1, 1, 2]


def test_a_trade_off_is_best_if_nothing_is_as_accurate_and_cheaper() -> None:
    assert [one.mode for one in pareto_front(RUNS, SIZE)] == ["w8a8", "fp32"]
    assert [one.mode for one in pareto_front(RUNS, LATENCY)] == ["fp32"]
    (group,) = comparable_groups(RUNS)
    assert marks(group)[FLOAT.run_id] == ("best for latency", "best for size")
    twin = replace(FLOAT, run_id="twin")
    assert pareto_front((*RUNS, twin), LATENCY) == (FLOAT, twin)  # neither beats the other
    unmeasured = replace(FLOAT, metrics={"mAP50-95": 0.9})
    assert pareto_front((unmeasured,), SIZE) == ()


def test_what_was_not_measured_is_a_dash_and_none() -> None:
    assert cells(FLOAT)[:6] == ("0.4670", "-", "-", "-", "-", "30.0")
    assert table_columns(comparable_groups(RUNS))["drop, points"] == [None, None, 1.9, None]


def test_figures_are_drawn_only_from_what_is_there() -> None:
    (group,) = comparable_groups(RUNS)
    assert pareto_figure(group, SIZE, "MB") is not None
    assert class_drop_figure(group) is not None
    assert ranges_figure(group) is not None
    (alone,) = comparable_groups((FLOAT,))
    assert pareto_figure(alone, SIZE, "MB") is None
    assert class_drop_figure(alone) is None
    (without,) = comparable_groups(tuple(replace(one, classes=()) for one in RUNS))
    assert class_drop_figure(without) is None
    assert ranges_figure(alone) is None


@pytest.mark.parametrize("cost", [SIZE, LATENCY])
def test_labels_of_runs_as_good_lie_apart(cost: str) -> None:
    def near(mode: str, drop: float, low: float, high: float, latency: float, size: float) -> ComparedRun:
        ends = {"mAP50-95_drop": drop, "mAP50-95_drop_ci_low": low, "mAP50-95_drop_ci_high": high}
        return run(mode, 0.4667 - drop / 100, latency, size, **ends)

    runs = (
        run("fp32", 0.4667, 19.4, 9.41), near("fp16", 0.03, -0.1, 0.1, 19.9, 4.76),
        near("w8a8", 0.14, -0.3, 0.8, 26.6, 2.77), near("w8a16", 0.2, -0.3, 0.5, 19.5, 2.61),
        near("w4a16", 0.23, -0.8, 1.7, 19.5, 2.67), near("w4a8", 0.68, 0.0, 2.1, 26.9, 2.77),
    )  # fmt: skip
    assert_labels_lie_apart(runs, cost)


@pytest.mark.parametrize("count", [2, 18])
def test_labels_of_equal_runs_lie_apart(count: int) -> None:
    """Without intervals, as files that were evaluated without a baseline have none."""
    assert_labels_lie_apart(tuple(run(f"w{number}a8", 0.45, 20.0, 2.7) for number in range(count)), SIZE)


def assert_labels_lie_apart(runs: tuple[ComparedRun, ...], cost: str) -> None:
    """And within the axes."""
    (group,) = comparable_groups(runs)
    figure = pareto_figure(group, cost, "cost")
    assert figure is not None
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(runs)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    points = [axes.transData.transform((one.metrics[cost], one.metrics["mAP50-95"])) for one in group.runs]
    assert not any(box.contains(*point) for box in boxes for point in points)
    inside = axes.get_window_extent()
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)


def test_the_report_needs_nothing_from_outside_and_escapes_names() -> None:
    page = report_html(comparable_groups(RUNS), "yolov10n <b>compared</b>", "Made today")
    assert "<b>compared" not in page
    assert not re.findall(r"(?:src|href|srcset)=\"(?!data:)", page)
    assert "http" not in page
    assert page.count("<tr>") == 1 + len(RUNS)
    assert page.count("data:image/jpeg") == 1 + len(RUNS)  # the ground truth and each run
    assert page.count("data:image/png") == 8  # four plots, light and dark
