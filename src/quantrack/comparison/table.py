"""The comparison as a table: one row a run, the same columns everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantrack.comparison.differences import MATRIX_CAPTION, matrix, matrix_markdown
from quantrack.comparison.runs import (
    ACCURACY,
    AGREEMENT,
    LATENCY,
    LATENCY_RATIO,
    SIZE,
    ComparedRun,
    Group,
    pareto_front,
)
from quantrack.runtime.machine_load import OTHERS, OtherLoad

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """A metric as people read it."""

    title: str
    metric: str
    form: str


COLUMNS = (
    Column("mAP50-95", ACCURACY, "{:.4f}"),
    Column("drop, points", f"{ACCURACY}_drop", "{:.2f}"),
    Column("from", f"{ACCURACY}_drop_ci_low", "{:.1f}"),
    Column("to", f"{ACCURACY}_drop_ci_high", "{:.1f}"),
    Column("agreement", AGREEMENT, "{:.3f}"),
    Column("latency p50, ms", LATENCY, "{:.1f}"),
    Column("times float32", LATENCY_RATIO, "{:.2f}"),
    Column("file, MB", SIZE, "{:.2f}"),
    Column("weight bits", "weight_bits_avg", "{:.2f}"),
    Column("stored bits", "weight_bits_stored_avg", "{:.2f}"),
    Column("Q nodes", "nodes_QuantizeLinear", "{:.0f}"),
    Column("DQ nodes", "nodes_DequantizeLinear", "{:.0f}"),
    Column("all nodes", "nodes_total", "{:.0f}"),
)


def cells(run: ComparedRun) -> tuple[str, ...]:
    """A run's figures as text, in the order of `COLUMNS`; a dash for what was not measured."""
    return tuple(
        column.form.format(run.metrics[column.metric]) if column.metric in run.metrics else MISSING
        for column in COLUMNS
    )


def marks(group: Group) -> dict[str, tuple[str, ...]]:
    """By run id, of which trade-offs the run is a best one: no other is as accurate and cheaper."""
    costs = {"best for latency": group.latency, "best for size": SIZE}
    best = {mark: {run.run_id for run in pareto_front(group.runs, cost)} for mark, cost in costs.items()}
    return {run.run_id: tuple(mark for mark, ids in best.items() if run.run_id in ids) for run in group.runs}


def doubt(group: Group) -> str:
    """A word on timings of a group while other processes were busy; empty where none were."""
    busy = [run.metrics[OTHERS] for run in group.runs if OtherLoad(run.metrics.get(OTHERS)).disturbs]
    if not busy:
        return ""
    return (
        f"{len(busy)} of {len(group.runs)} runs were timed while other processes kept up to {max(busy):.1f} cores "
        "busy: measure again before you go by latencies."
    )


def table_columns(groups: Sequence[Group]) -> dict[str, list[object]]:
    """`comparison.json`: every column with one value a run; None for what was not measured."""
    rows = [(number, group, run) for number, group in enumerate(groups, 1) for run in group.runs]
    table: dict[str, list[object]] = {
        "run": [run.label for _, _, run in rows],
        **{column.title: [_rounded(run.metrics.get(column.metric)) for _, _, run in rows] for column in COLUMNS},
        "group": [number for number, _, _ in rows],
        "measured on": [group.circumstances.text for _, group, _ in rows],
        "mode": [run.mode for _, _, run in rows],
        "recipe": [run.recipe for _, _, run in rows],
        "model": [run.model for _, _, run in rows],
        "run_id": [run.run_id for _, _, run in rows],
    }
    return table


def _rounded(value: float | None) -> float | None:
    """To four decimals: more are noise, and do not fit the table in the UI."""
    return None if value is None else round(value, 4)


def summary_markdown(groups: Sequence[Group], title: str) -> str:
    """`summary.md`: a table for each group of comparable runs."""
    lines = [f"# {title}", ""]
    if len(groups) > 1:
        lines += [
            f"{len(groups)} groups that must not be compared with each other: they were measured differently.",
            "",
        ]
    for group in groups:
        lines += [f"Measured on {group.circumstances.text}.", ""]
        lines += ["| " + " | ".join(("run", *(column.title for column in COLUMNS))) + " |"]
        lines += ["| --- |" + " ---: |" * len(COLUMNS)]
        lines += ["| " + " | ".join((run.label, *cells(run))) + " |" for run in group.runs]
        lines += [""]
        if said := doubt(group):
            lines += [said, ""]
        between = matrix(group)
        if between is not None:
            lines += [MATRIX_CAPTION, "", *matrix_markdown(between), ""]
    lines += [
        "`drop` is held against float32, `from` and `to` bound it at 95 % (paired bootstrap over the pictures);",
        "`agreement` is mAP50-95 with float32's sure detections as truth;",
        "`times float32` is the latency over that of the float32 file, timed in turns. A dash: not measured.",
    ]
    return "\n".join(lines) + "\n"
