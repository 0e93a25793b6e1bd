"""Read finished runs for a comparison, and log the comparison to the active run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import cv2
import mlflow
import numpy as np
from mlflow.entities import Run

from quantrack.comparison.differences import difference_columns
from quantrack.comparison.plots import LIGHT
from quantrack.comparison.report import group_plots, report_html
from quantrack.comparison.runs import (
    ACCURACY,
    CIRCUMSTANCES,
    COMPARED,
    Circumstances,
    ClassScore,
    ComparedRun,
    Group,
    Sample,
)
from quantrack.comparison.table import summary_markdown, table_columns
from quantrack.errors import QuantrackError
from quantrack.evaluation.samples import split_panels
from quantrack.schemes import SCHEMES, Variant
from quantrack.tracking.environment import git_commit, installed_versions
from quantrack.tracking.log import log_description, log_table
from quantrack.tracking.read import evaluation_name, has_artifact, read_json, require_run
from quantrack.tracking.resample import resampled_runs

SAMPLES = 4


def read_runs(run_ids: Sequence[str]) -> tuple[ComparedRun, ...]:
    """The runs of these ids, in order, resampled where they were measured alike.

    Raises:
        QuantrackError: one is not there, is not finished, or measured no accuracy.
    """
    runs = {run.run_id: run for run in map(read_run, run_ids)}
    return resampled_runs(list(runs.values()))


def read_run(run_id: str) -> ComparedRun:
    """One finished run of `baseline`, `ptq`, `qat` or `evaluate`.

    Raises:
        QuantrackError: it is not there, is not finished, or measured no accuracy.
    """
    run = require_run(run_id, "runs")
    if run.info.status != "FINISHED":
        raise QuantrackError(f"runs={run_id}: the run is {run.info.status}; only finished runs are compared")
    missing = [tag for tag in (*CIRCUMSTANCES, "mode", "recipe", "model_name") if tag not in run.data.tags]
    if missing:
        raise QuantrackError(
            f"runs={run_id}: it does not say its {missing[0]}; give ids of runs of baseline, ptq, qat or evaluate"
        )
    if ACCURACY not in run.data.metrics:
        raise QuantrackError(f"runs={run_id}: it has no {ACCURACY}; give runs that measured it")
    return _compared(run)


def _compared(run: Run) -> ComparedRun:
    tags, run_id = run.data.tags, run.info.run_id
    with tempfile.TemporaryDirectory() as folder:
        return ComparedRun(
            run_id, run.info.run_name or run_id, tags["mode"], tags["recipe"], tags["model_name"],
            Circumstances(evaluation_name(run), *(tags[name] for name in CIRCUMSTANCES)), dict(run.data.metrics),
            _classes(run_id), _ranges(run_id), _samples(run_id, Path(folder)), variant=_variant(tags),
            model_digest=tags.get("model_digest", ""),
        )  # fmt: skip


def _variant(tags: Mapping[str, str]) -> str:
    """What sets a quantized run's file apart from the usual one; runs older than these tags have that."""
    return " ".join(Variant.of(tags).words) if tags["mode"] in SCHEMES else ""


def _classes(run_id: str) -> tuple[ClassScore, ...]:
    if not has_artifact(run_id, "per_class_ap.json"):
        return ()
    content = read_json(run_id, "per_class_ap.json")
    at = {name: place for place, name in enumerate(content["columns"])}
    return tuple(
        ClassScore(str(row[at["class"]]), float(row[at["AP50-95"]]), int(row[at["boxes"]])) for row in content["data"]
    )


def _ranges(run_id: str) -> dict[str, tuple[float, float]]:
    if not has_artifact(run_id, "calibration.json"):
        return {}
    quantizers = read_json(run_id, "calibration.json")["activation_quantizers"]
    return {name: (float(one["minimum"]), float(one["maximum"])) for name, one in quantizers.items()}


def _samples(run_id: str, folder: Path) -> tuple[Sample, ...]:
    """The first sample pictures, cut to the ground truth and the run's own panel."""
    client = mlflow.MlflowClient()
    names = sorted(entry.path for entry in client.list_artifacts(run_id, "samples") if entry.path.endswith(".png"))
    samples = []
    for name in names[:SAMPLES]:
        picture = cv2.imread(client.download_artifacts(run_id, name, str(folder)))
        if picture is not None:
            panels = split_panels(np.ascontiguousarray(picture[:, :, ::-1], dtype=np.uint8))
            samples.append(Sample(Path(name).name, panels[0], panels[-1]))
    return tuple(samples)


def log_comparison(groups: Sequence[Group], title: str) -> None:
    """`comparison.json`, `differences.json`, `report.html`, `summary.md`, plots by group; the run's description."""
    run_ids = [run.run_id for group in groups for run in group.runs]
    mlflow.set_tag(COMPARED, ",".join(run_ids))
    log_table(table_columns(groups), "comparison.json")
    log_table(difference_columns(groups), "differences.json")
    text = summary_markdown(groups, title)
    mlflow.log_text(text, "summary.md")
    log_description(text, "summary.md")
    mlflow.log_text(report_html(groups, title, _made()), "report.html")
    for number, group in enumerate(groups, 1):
        suffix = f"_group{number}" if len(groups) > 1 else ""
        for plot in group_plots(group):
            figure = plot.draw(LIGHT)
            if figure is not None:
                mlflow.log_figure(figure, f"plots/{plot.name}{suffix}.png")


def _made() -> str:
    """When and by which code the comparison was made."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    # `mlflow run` runs the source itself, not installed, in the environments that it builds
    version = installed_versions().get("quantrack", "")
    commit = git_commit().get("git_commit", "")
    words = ["Quantrack", *([version] if version else [])]
    return f"Made {now} by {' '.join(words)}" + (f", commit {commit[:12]}" if commit else "")
