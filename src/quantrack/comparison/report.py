"""The comparison as one self-contained HTML file: no network, any screen, light or dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import NDArray

from quantrack.comparison.differences import MATRIX_CAPTION, Matrix, matrix
from quantrack.comparison.plots import DARK, LIGHT, Theme, class_drop_figure, pareto_figure, ranges_figure
from quantrack.comparison.runs import LATENCY, SIZE, ComparedRun, Group
from quantrack.comparison.table import COLUMNS, cells, doubt, marks

TEMPLATE = "report.html.j2"
JPEG_QUALITY = 82
SAMPLE_WIDTH = 480  # pixels

Draw = Callable[[Theme], Figure | None]


@dataclass(frozen=True)
class Plot:
    """A figure to be drawn on either paper: its file name, and what it shows in words."""

    name: str
    caption: str
    draw: Draw


@dataclass(frozen=True)
class PlotView:
    """A plot as the page shows it: two data URIs."""

    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it."""

    label: str
    run_id: str
    name: str
    model: str
    cells: tuple[str, ...]
    marks: tuple[str, ...]


@dataclass(frozen=True)
class SampleView:
    """One picture, as each run sees it: label and data URI."""

    name: str
    panels: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class GroupView:
    """One group of comparable runs."""

    measured_on: str
    runs: tuple[RunView, ...]
    doubt: str
    between: Matrix | None
    plots: tuple[PlotView, ...]
    samples: tuple[SampleView, ...]


def group_plots(group: Group) -> tuple[Plot, ...]:
    """All figures of a group, in the order of the page."""
    latency, unit = group.latency, "ms" if group.latency == LATENCY else "times float32's, in turns"
    return (
        Plot("pareto_latency", "Accuracy against latency, with 95 % intervals of the drop",
             lambda theme: pareto_figure(group, latency, f"median latency, {unit}", theme)),
        Plot("pareto_size", "Accuracy against file size, with 95 % intervals of the drop",
             lambda theme: pareto_figure(group, SIZE, "file, MB", theme)),
        Plot("class_drop", "What each class loses against float32; few boxes are noise",
             lambda theme: class_drop_figure(group, theme)),
        Plot("activation_ranges", "Where the activation quantizers clip; modes with the same ranges are one band",
             lambda theme: ranges_figure(group, theme)),
    )  # fmt: skip


def report_html(groups: Sequence[Group], title: str, made: str) -> str:
    """The page; `made` says when and by what."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title,
        made=made,
        columns=[column.title for column in COLUMNS],
        matrix_caption=MATRIX_CAPTION,
        groups=[group_view(group) for group in groups],
    )


def group_view(group: Group) -> GroupView:
    """What the page shows of a group; figures that lack data are left out."""
    marked = marks(group)
    runs = tuple(
        RunView(run.label, run.run_id, run.name, run.model, cells(run), marked[run.run_id]) for run in group.runs
    )
    plots = []
    for plot in group_plots(group):
        light, dark = plot.draw(LIGHT), plot.draw(DARK)
        if light is not None and dark is not None:
            plots.append(PlotView(plot.caption, _png_uri(light), _png_uri(dark)))
    return GroupView(
        group.circumstances.text, runs, doubt(group), matrix(group), tuple(plots), sample_views(group.runs)
    )


def sample_views(runs: Sequence[ComparedRun]) -> tuple[SampleView, ...]:
    """Each picture that every run with samples has, side by side."""
    shown = [run for run in runs if run.samples]
    if not shown:
        return ()
    by_run = [{sample.name: sample for sample in run.samples} for run in shown]
    views = []
    for name, first in by_run[0].items():
        if all(name in own for own in by_run):
            panels = [(run.label, _jpeg_uri(own[name].pixels)) for run, own in zip(shown, by_run, strict=True)]
            views.append(SampleView(name, (("ground truth", _jpeg_uri(first.truth)), *panels)))
    return tuple(views)


def _png_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _uri("png", buffer.getvalue())


def _jpeg_uri(pixels: NDArray[np.uint8]) -> str:
    height, width = pixels.shape[:2]
    size = (min(SAMPLE_WIDTH, width), max(1, round(height * min(1.0, SAMPLE_WIDTH / width))))
    smaller = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", smaller[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return _uri("jpeg", encoded.tobytes())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
