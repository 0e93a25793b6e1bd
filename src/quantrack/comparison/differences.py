"""How certain it is that one run of a comparison is better than another: paired, over the same pictures.

Two intervals against float32 that overlap say little of the two runs between them: both are hard on the same
pictures, and the difference of a pair is surer than either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from quantrack.comparison.runs import ACCURACY, ComparedRun, Group
from quantrack.evaluation.bootstrap import BootstrapSettings, drop_bounds
from quantrack.evaluation.coco_metrics import drop_points

MATRIX_CAPTION = (
    "How many points of mAP50-95 the run of a row is above that of a column, and in brackets the 95 % interval "
    "(paired bootstrap over the same pictures); bold where all of it is above zero."
)


@dataclass(frozen=True)
class Difference:
    """How many points of mAP50-95 `better` has more than `other`, and the 95 % interval of that."""

    better: ComparedRun
    other: ComparedRun
    points: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low > 0

    @property
    def text(self) -> str:
        return f"{self.points:.2f} ({self.low:.2f} to {self.high:.2f})"


def differences(group: Group) -> tuple[Difference, ...]:
    """Every pair of a group's runs, the better one first; runs that were not resampled are left out."""
    known = [(run, run.resampled) for run in group.runs if run.resampled is not None and ACCURACY in run.metrics]
    return tuple(
        Difference(
            better, other,
            drop_points(better.metrics[ACCURACY], other.metrics[ACCURACY]),
            *drop_bounds(above, below, BootstrapSettings().confidence),
        )
        for (better, above), (other, below) in combinations(known, 2)
    )  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """Differences for people: one row a better run, one column a worse one; None below the diagonal."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Difference | None, ...]], ...]


def matrix(group: Group) -> Matrix | None:
    """The differences of a group as a matrix; None where there are none."""
    found = differences(group)
    if not found:
        return None
    by_pair = {(one.better.label, one.other.label): one for one in found}
    betters = tuple(dict.fromkeys(one.better.label for one in found))
    others = tuple(dict.fromkeys(one.other.label for one in found))
    return Matrix(others, tuple((row, tuple(by_pair.get((row, column)) for column in others)) for row in betters))


def matrix_markdown(shown: Matrix) -> list[str]:
    """The matrix as lines of Markdown; what is sure is bold."""
    lines = ["| is above by | " + " | ".join(shown.columns) + " |", "| --- |" + " ---: |" * len(shown.columns)]
    for label, row in shown.rows:
        cells = ["" if one is None else f"**{one.text}**" if one.sure else one.text for one in row]
        lines.append("| " + " | ".join((label, *cells)) + " |")
    return lines


def difference_columns(groups: Sequence[Group]) -> dict[str, list[object]]:
    """`differences.json`: every column with one value a pair of runs."""
    rows = [(number, one) for number, group in enumerate(groups, 1) for one in differences(group)]
    return {
        "better run": [one.better.label for _, one in rows],
        "other run": [one.other.label for _, one in rows],
        "points": [round(one.points, 4) for _, one in rows],
        "from": [round(one.low, 4) for _, one in rows],
        "to": [round(one.high, 4) for _, one in rows],
        "sure": [one.sure for _, one in rows],
        "group": [number for number, _ in rows],
        "better run_id": [one.better.run_id for _, one in rows],
        "other run_id": [one.other.run_id for _, one in rows],
    }
