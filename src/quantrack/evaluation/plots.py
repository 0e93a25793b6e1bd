"""Figures of one evaluation; they hold no global state and are saved with `Figure.savefig`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quantrack.evaluation.types import CocoResult
from quantrack.quantization.bit_plan import BitPlan
from quantrack.quantization.sensitivity import LayerSensitivity
from quantrack.runtime.placement import Placement

DARK, LIGHT, ACCENT, GREY = "#1f5a8a", "#b9d3e8", "#d9822b", "#555555"
LOSS_COLOURS = (DARK, "#5c9bc8", LIGHT, GREY, "#3a8f5c", "#8a4f9e")
SHOWN_OPERATORS = 15
BAR_INCHES, BAR_HEIGHT = 0.19, 0.78
DPI = 120


def precision_recall_figure(result: CocoResult, title: str) -> Figure:
    """Precision over recall at IoU 0.50 and 0.75, averaged over the classes with ground truth."""
    figure, axes = new_figure(6.4, 4.8)
    curves = (
        ("0.50", "mAP50", result.precision_at_50, DARK),
        ("0.75", "mAP75", result.precision_at_75, ACCENT),
    )
    for iou, key, precision, colour in curves:
        score = f"   {key} {result.metrics[key]:.3f}" if key in result.metrics else ""
        axes.plot(result.recall_thresholds, precision, color=colour, linewidth=2, label=f"IoU {iou}{score}")
        axes.fill_between(result.recall_thresholds, precision, color=colour, alpha=0.08, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision (mean over classes)")
    axes.set_title(as_it_is(title), loc="left", fontweight="bold")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.legend(frameon=False, loc="upper right")
    return figure


def training_figure(history: Mapping[str, Sequence[tuple[int, float]]], score: str) -> Figure:
    """Curves over epochs: every loss on the left axis, the validation score of that name on the right one."""
    figure, axes = new_figure(7.2, 4.4)
    losses = {name: points for name, points in history.items() if name != score and points}
    for (name, points), colour in zip(losses.items(), itertools.cycle(LOSS_COLOURS), strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, marker="o", markersize=3, label=name)
    axes.set(xlabel="epoch", ylabel="loss per picture")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    right = axes.twinx()
    right.plot(*zip(*history[score], strict=True), color=ACCENT, linewidth=2.4, marker="o", markersize=4, label=score)
    right.set_ylabel(score, color=ACCENT)
    right.spines[["top"]].set_visible(False)
    handles = [line for each in (axes, right) for line in each.get_lines()]
    axes.legend(handles=handles, frameon=False, loc="upper right")
    return figure


def per_class_ap_figure(result: CocoResult, title: str) -> Figure:
    """AP50-95 (dark) and AP50 (light) of every class with ground truth, the best on top."""
    ranked = sorted(
        ((one.ap50_95, one.ap50 or 0.0, one) for one in result.classes if one.ap50_95 is not None),
        key=lambda row: (-row[0], row[2].name),
    )
    figure, axes = new_figure(7.2, 1.5 + BAR_INCHES * max(len(ranked), 3))
    places = range(len(ranked))
    axes.barh(places, [ap50 for _, ap50, _ in ranked], color=LIGHT, height=BAR_HEIGHT, label="AP50")
    axes.barh(places, [ap for ap, _, _ in ranked], color=DARK, height=BAR_HEIGHT, label="AP50-95")
    for place, (ap, ap50, _) in enumerate(ranked):
        axes.text(max(ap, ap50) + 0.008, place, f"{ap:.2f} / {ap50:.2f}", va="center", fontsize=7, color=GREY)
    axes.set_yticks(places, [as_it_is(f"{one.name} ({one.boxes})") for _, _, one in ranked], fontsize=8)
    axes.set(xlim=(0, 1.14), ylim=(max(len(ranked), 1) - 0.4, -0.6), xlabel="average precision (AP50-95 / AP50)")
    axes.set_title(as_it_is(title), loc="left", fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    figure.legend(frameon=False, loc="outside lower right", ncols=2, fontsize=8)
    return figure


def sensitivity_figure(rows: Sequence[LayerSensitivity], plan: BitPlan, unit: str) -> Figure:
    """Each layer's error at the fewest bits, in the network's order; orange where the plan gives it more."""
    figure, axes = new_figure(7.2, 1.5 + BAR_INCHES * max(len(rows), 3))
    bits = sorted(rows[0].errors)
    places = range(len(rows))
    colours = [DARK if plan.average(row.name) == bits[0] else ACCENT for row in rows]
    axes.barh(places, [row.errors[bits[0]] for row in rows], color=colours, height=BAR_HEIGHT)
    axes.set_yticks(places, [f"{row.name}  ({row.role.value})" for row in rows], fontsize=7)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"error at {bits[0]} bits, one layer at a time ({unit})")
    axes.set_title("Sensitivity; orange: the plan gives more bits", loc="left", fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    return figure


def placement_figure(placement: Placement) -> Figure:
    """Milliseconds a picture of the operators that take the most, by provider."""
    shown = placement.uses[:SHOWN_OPERATORS][::-1]
    providers = sorted({use.provider for use in placement.uses})
    colours = dict(zip(providers, (DARK, ACCENT, GREY), strict=False))
    figure, axes = new_figure(6.4, 1.2 + BAR_INCHES * 1.4 * len(shown))
    places = range(len(shown))  # not labels: one operator may run as often on each of two providers
    axes.barh(places, [use.milliseconds for use in shown], BAR_HEIGHT, color=[colours[use.provider] for use in shown])
    axes.set_yticks(places, [f"{use.operator} x {use.nodes}" for use in shown])
    for provider in providers:
        axes.barh([0], [0], color=colours[provider], label=provider)
    axes.set(xlabel="milliseconds a picture, with the profiler on")
    axes.set_title("time by operator", loc="left", fontweight="bold")
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.legend(frameon=False, loc="lower right")
    return figure


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one plot, whose top and right stay open."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def as_it_is(text: str) -> str:
    """A text of users as Matplotlib is to draw it, which takes what stands between two dollars for a formula."""
    return text.replace("$", r"\$")
