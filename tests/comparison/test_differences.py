"""How sure one run is better than another, as a matrix and as a table."""

from dataclasses import replace

import numpy as np
import pytest

from quantrack.comparison.differences import difference_columns, differences, matrix, matrix_markdown
from quantrack.comparison.report import report_html
from quantrack.comparison.runs import Circumstances, ComparedRun, Group, comparable_groups
from quantrack.comparison.table import summary_markdown

HERE = Circumstances("val2017-100", "d" * 64, "one2one", "640", "cpu", "a processor")
PICTURES = np.random.default_rng(0).normal(0.0, 0.05, 1000)  # what resamples do to all runs alike


def run(mode: str, accuracy: float, own_noise: float) -> ComparedRun:
    noise = np.random.default_rng(len(mode) + int(1000 * accuracy)).normal(0.0, own_noise, 1000)
    return ComparedRun(
        f"run of {mode}", mode, mode, "default", "yolov10n", HERE, {"mAP50-95": accuracy},
        resampled=accuracy + PICTURES + noise,
    )  # fmt: skip


def group_of(*runs: ComparedRun) -> Group:
    (group,) = comparable_groups(runs)
    return group


THREE = group_of(run("w4a8", 0.45, 0.001), run("fp32", 0.47, 0.001), run("w8a8", 0.469, 0.001))


def test_every_pair_is_held_once_the_better_first() -> None:
    found = differences(THREE)
    assert [(one.better.mode, one.other.mode) for one in found] == [
        ("fp32", "w8a8"), ("fp32", "w4a8"), ("w8a8", "w4a8")
    ]  # fmt: skip
    assert [one.points for one in found] == pytest.approx([0.1, 2.0, 1.9])
    assert all(one.low < one.points < one.high for one in found)
    assert [one.sure for one in found] == [False, True, True]


def test_what_all_resamples_share_makes_no_difference_uncertain() -> None:
    """The pictures move each run by five points and the pair by a quarter of one."""
    ends = [(one.low, one.high) for one in differences(THREE)]
    assert all(high - low < 1.0 for low, high in ends)


def test_runs_that_were_not_resampled_are_left_out() -> None:
    alone = group_of(run("w4a8", 0.45, 0.001), replace(run("fp32", 0.47, 0.001), resampled=None))
    assert differences(alone) == ()
    assert matrix(alone) is None
    assert "is above by" not in summary_markdown((alone,), "title")
    assert "Between runs" not in report_html((alone,), "title", "Made today")
    assert difference_columns((alone,))["points"] == []


def test_the_matrix_has_a_row_for_each_better_run_and_marks_what_is_sure() -> None:
    shown = matrix(THREE)
    assert shown is not None
    assert shown.columns == ("W8A8", "W4A8")
    assert [label for label, _ in shown.rows] == ["float32", "W8A8"]
    first, second = (row for _, row in shown.rows)
    assert first[0] is not None
    assert second[0] is None
    lines = matrix_markdown(shown)
    assert lines[0] == "| is above by | W8A8 | W4A8 |"
    assert lines[2].startswith("| float32 | 0.10 (-")
    assert "**2.00 (1" in lines[2]
    assert lines[3].startswith("| W8A8 |  | **1.90 (1")


def test_the_report_and_the_summary_show_it() -> None:
    page = report_html((THREE,), "title", "Made today")
    assert page.count("<strong>") == 2
    assert "Between runs" in page
    assert "| float32 | 0.10 (-" in summary_markdown((THREE,), "title")


def test_the_table_keeps_all_pairs_of_all_groups() -> None:
    table = difference_columns((THREE, THREE))
    assert table["better run"] == ["float32", "float32", "W8A8"] * 2
    assert table["group"] == [1, 1, 1, 2, 2, 2]
    assert table["sure"] == [False, True, True] * 2
    assert {len(column) for column in table.values()} == {6}
