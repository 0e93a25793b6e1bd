"""Figures of a comparison, on light or on dark paper; saved with `Figure.savefig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from quantrack.comparison.runs import ACCURACY, ComparedRun, Group, pareto_front
from quantrack.evaluation.plots import as_it_is, new_figure

ROW_INCHES = 0.2
MOST_CLASSES = 40
LABEL_HEIGHT, LABEL_WIDTH, LABEL_GAP = 0.05, 0.3, 0.02  # of the axes; the gap is to its point
COLOUR_LIMIT = 15.0  # points; a larger change is as dark


@dataclass(frozen=True)
class Theme:
    """The colours of a figure; `better` and `worse` are the ends of the heat map."""

    paper: str
    ink: str
    quiet: str
    grid: str
    accent: str
    front: str
    better: str
    worse: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1c1c1e", "#5f6368", "#e4e4e4", "#1f5a8a", "#d9822b", "#2b7bba", "#c8501e",
    ("#1f5a8a", "#d9822b", "#3a8f5c", "#8a4f9e", "#b03a48", "#6b6b6b"),
)  # fmt: skip
DARK = Theme(
    "#16181c", "#e8eaed", "#9aa0a6", "#33373d", "#7fb8e6", "#f0a75a", "#5aa9e6", "#f0774a",
    ("#7fb8e6", "#f0a75a", "#7cc79a", "#c594d8", "#e68a95", "#b0b0b0"),
)  # fmt: skip


def pareto_figure(group: Group, cost: str, label: str, theme: Theme = LIGHT) -> Figure | None:
    """mAP50-95, with its 95 % interval where there is one, against a cost; the best trade-offs are joined.

    None where fewer than two runs have both figures.
    """
    runs = [run for run in group.runs if ACCURACY in run.metrics and cost in run.metrics]
    if len(runs) < 2:
        return None
    figure, axes = _figure(6.8, 4.8, theme)
    front = pareto_front(runs, cost)
    axes.plot(
        [run.metrics[cost] for run in front], [run.metrics[ACCURACY] for run in front],
        color=theme.front, linewidth=1.5, drawstyle="steps-post", label="best trade-offs", zorder=1,
    )  # fmt: skip
    for run in runs:
        x, y = run.metrics[cost], run.metrics[ACCURACY]
        low, high = _accuracy_interval(run)
        axes.errorbar(x, y, [[y - low], [high - y]], color=theme.quiet, linewidth=1, capsize=2, zorder=2)
        axes.scatter(x, y, s=46, color=theme.front if run in front else theme.accent, zorder=3)
    axes.set(xlabel=label, ylabel="mAP50-95")
    axes.margins(x=0.12, y=0.08)
    _place_labels(axes, runs, cost, theme)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_title("Up and to the left is better", loc="left", fontweight="bold", color=theme.ink)
    axes.legend(frameon=False, labelcolor=theme.ink, loc="lower right", fontsize=8)
    return figure


def _accuracy_interval(run: ComparedRun) -> tuple[float, float]:
    """The accuracy's own interval, from that of the drop; the point itself where there is none."""
    accuracy = run.metrics[ACCURACY]
    drop, low, high = (run.metrics.get(f"{ACCURACY}_drop{end}") for end in ("", "_ci_low", "_ci_high"))
    if drop is None or low is None or high is None:
        return accuracy, accuracy
    reference = accuracy + drop / 100
    return min(reference - high / 100, accuracy), max(reference - low / 100, accuracy)


def _place_labels(axes: Axes, runs: Sequence[ComparedRun], cost: str, theme: Theme) -> None:
    """Each label beside its point, moved down or up where it would lie on one that is placed or on another point."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    wide, high = right - left, top - bottom
    half = LABEL_HEIGHT / 2 * high
    placed: list[tuple[float, float]] = []
    for run in sorted(runs, key=lambda run: -run.metrics[ACCURACY]):
        x, y = run.metrics[cost], run.metrics[ACCURACY]
        beyond = x > (left + right) / 2
        side = -1 if beyond else 1
        near = [spot for at, spot in placed if abs(x - at) < LABEL_WIDTH * wide]
        near += [
            one.metrics[ACCURACY]
            for one in runs
            if LABEL_GAP * wide / 2 < side * (one.metrics[cost] - x) < LABEL_WIDTH * wide
        ]
        steps = (sign * step * half for step in range(ceil(2 / LABEL_HEIGHT)) for sign in (-1, 1))
        within = (y + step for step in steps if bottom + half <= y + step <= top - half)
        free = (spot for spot in within if all(abs(spot - other) >= LABEL_HEIGHT * high for other in near))
        spot = next(free, y)
        placed.append((x, spot))
        axes.annotate(
            as_it_is(run.label), (x, y), (x + side * LABEL_GAP * wide, spot), fontsize=8, va="center",
            ha="right" if beyond else "left", color=theme.ink,
        )  # fmt: skip


def class_drop_figure(group: Group, theme: Theme = LIGHT) -> Figure | None:
    """A heat map of what each class loses against float32 of the same model, in points of AP50-95.

    The classes with most true boxes, at most forty. None where no run has a float32 run beside it.
    """
    columns = [run for run in group.runs if run.mode != "fp32" and _reference(group, run) is not None]
    if not columns:
        return None
    classes = _largest_classes(columns)
    if not classes:
        return None
    drops = np.array([[_class_drop(group, run, name) for run in columns] for name, _ in classes])
    figure, axes = _figure(1.9 + 0.95 * max(len(columns), 3), 1.6 + ROW_INCHES * max(len(classes), 3), theme)
    scale = LinearSegmentedColormap.from_list("drop", [theme.better, theme.paper, theme.worse])
    axes.imshow(drops, cmap=scale, vmin=-COLOUR_LIMIT, vmax=COLOUR_LIMIT, aspect="auto")
    for (row, column), drop in np.ndenumerate(drops):
        if np.isfinite(drop):
            axes.text(column, row, f"{drop:.1f}", ha="center", va="center", fontsize=7, color=theme.ink)
    axes.set_xticks(range(len(columns)), [as_it_is(run.label) for run in columns], fontsize=8, rotation=20, ha="right")
    axes.set_yticks(range(len(classes)), [as_it_is(f"{name} ({boxes})") for name, boxes in classes], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(
        "Points lost against float32, by class (boxes)", x=0.02, ha="left", fontweight="bold", color=theme.ink
    )
    return figure


def _reference(group: Group, run: ComparedRun) -> dict[str, float] | None:
    """The float32 scores by class of the run's model, where it is in the group."""
    found = group.float_run(run)
    return {one.name: one.ap for one in found.classes} if found is not None and found.classes else None


def _largest_classes(runs: Sequence[ComparedRun]) -> list[tuple[str, int]]:
    boxes = {one.name: one.boxes for run in runs for one in run.classes}
    return sorted(boxes.items(), key=lambda item: (-item[1], item[0]))[:MOST_CLASSES]


def _class_drop(group: Group, run: ComparedRun, name: str) -> float:
    own = {one.name: one.ap for one in run.classes}
    reference = _reference(group, run) or {}
    return 100 * (reference[name] - own[name]) if name in own and name in reference else float("nan")


def ranges_figure(group: Group, theme: Theme = LIGHT) -> Figure | None:
    """The activation quantizers' ranges along the network, one band a run; None where no run has any."""
    runs = _different_ranges([run for run in group.runs if run.ranges])
    if not runs:
        return None
    figure, axes = _figure(8.4, 4.4, theme)
    names = list(dict.fromkeys(name for run in runs for name in run.ranges))
    for run, colour in zip(runs, theme.cycle * len(runs), strict=False):
        low, high = _ends(run, names)
        axes.fill_between(range(len(names)), low, high, color=colour, alpha=0.15, step="mid", linewidth=0)
        axes.step(range(len(names)), high, where="mid", color=colour, linewidth=1.4, label=as_it_is(run.label))
        axes.step(range(len(names)), low, where="mid", color=colour, linewidth=1.4)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="convolution, in the network's order", ylabel="range of the INT8 input (symmetric log)")
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_title("Calibrated activation ranges", loc="left", fontweight="bold", color=theme.ink)
    figure.legend(frameon=False, labelcolor=theme.ink, fontsize=8, loc="outside lower right", ncols=3)
    return figure


def _different_ranges(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs whose ranges no run before has: modes that share a calibration have the same."""
    found: list[ComparedRun] = []
    for run in runs:
        if all(run.ranges != other.ranges for other in found):
            found.append(run)
    return found


def _ends(run: ComparedRun, names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    nothing = (float("nan"), float("nan"))
    ends = np.array([run.ranges.get(name, nothing) for name in names])
    return ends[:, 0], ends[:, 1]


def _figure(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    figure, axes = new_figure(width, height)
    figure.set_facecolor(theme.paper)
    axes.set_facecolor(theme.paper)
    axes.spines[["bottom", "left"]].set_color(theme.quiet)
    axes.tick_params(colors=theme.quiet)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    return figure, axes
