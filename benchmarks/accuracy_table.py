"""Measure every mode through `mlflow run` and write the accuracy tables of the documents.

    python benchmarks/accuracy_table.py MODEL DATA_ROOT --name yolov10n-val100

Runs each entry point below in the experiment `accuracy-NAME` (in `mlflow.db` here, as `mlflow ui`
shows it), then writes `benchmarks/results/NAME.json` and `.md` with date, hardware and versions.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import mlflow
import typer
from mlflow.entities import Run

from quantrack.tracking.environment import cpu_name, device_name, installed_versions

ROOT = Path(__file__).resolve().parents[1]
STRICT = "benchmarks/recipes/strict.yaml"  # every convolution but DFL's at 4 bits
# Steps draw other positions and values of the same pictures: what is held against a target has two seeds.
TWICE = (
    {"mode": "w8a16", "recipe": "default"},
    {"mode": "w8a8", "recipe": "default"},
    {"mode": "w4a16", "recipe": "best"},
    {"mode": "w4a8", "recipe": "best"},
    {"mode": "w4a8", "recipe": "best", "avg_bits": "4.1"},
    {"mode": "w4a16", "recipe": "default"},
    {"mode": "w4a8", "recipe": "default"},
    {"mode": "w4a8", "recipe": STRICT},
)
ONCE = (
    {"mode": "w4a8", "recipe": "best", "plan_by": "layer"},
    {"mode": "w4a8", "recipe": "best", "plan_bits": "4,7"},
    {"mode": "w4a8", "recipe": "default", "avg_bits": "0"},
    {"mode": "w4a8", "recipe": "fast"},
    {"mode": "w8a8", "recipe": "naive"},
    {"mode": "w4a8", "recipe": "naive"},
)
CASES = (
    ("baseline", {"precision": "fp32"}),
    ("baseline", {"precision": "fp16"}),
    *(("ptq", case | {"seed": "0"}) for case in TWICE),
    *(("ptq", case | {"seed": "1"}) for case in TWICE),
    *(("ptq", case) for case in ONCE),
)
COLUMNS = (
    ("mAP50-95", "{:.4f}"),
    ("mAP50", "{:.4f}"),
    ("mAP50-95_drop", "{:.2f}"),
    ("mAP50-95_drop_ci_low", "{:.1f}"),
    ("mAP50-95_drop_ci_high", "{:.1f}"),
    ("float32_agreement", "{:.3f}"),
    ("weight_bits_avg", "{:.2f}"),
    ("weight_bits_stored_avg", "{:.2f}"),
    ("onnx_mb", "{:.2f}"),
    ("latency_ratio", "{:.2f}"),  # timed in turns with float32: rows of a slow and of a fast hour compare
    ("quantize_seconds", "{:.0f}"),
)
HEADER = (
    "run",
    "mAP50-95",
    "mAP50",
    "drop, points",
    "from",
    "to",
    "agreement",
    "weight bits",
    "stored",
    "file, MB",
    "latency, x float32",
    "quantize, s",
)


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint, as for the entry points.")],
    data_root: Annotated[str, typer.Argument(help="Data root, as for the entry points.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    latency_runs: Annotated[int, typer.Option(help="Timed runs each.")] = 100,
    only: Annotated[str, typer.Option(help="SETTING=VALUE of rows to measure anew; the other rows stay.")] = "",
) -> None:
    """Measure all cases, or those with one setting, and write the table."""
    shared = {"model": model, "data_root": data_root, "latency_runs": str(latency_runs)}
    setting, _, value = only.partition("=")
    cases = [case for case in CASES if not only or case[1].get(setting) == value]
    if not cases:
        raise typer.BadParameter(f"only={only}: no case has it; give a setting of one, as mode=w4a8")
    for number, (entry_point, parameters) in enumerate(cases):
        submitted = mlflow.projects.run(
            str(ROOT), entry_point, parameters=shared | parameters, env_manager="local",
            experiment_name=f"accuracy-{name}",
        )  # fmt: skip
        # what is finished stays, should a later run fail
        text = add_result(mlflow.get_run(submitted.run_id), name, latency_runs, anew=not only and number == 0)
    print(text)


def add_result(run: Run, name: str, latency_runs: int, *, anew: bool) -> str:
    """Put a run into the record and the table, in the place of an earlier one of its name; the table.

    With `anew` the record starts with this run; otherwise it must be of the same hardware, versions and pictures.
    """
    path = ROOT / "benchmarks/results" / f"{name}.json"
    context = {
        "hardware": device_name(run.data.tags["provider"]),
        "cpu": cpu_name(),
        "provider": run.data.tags["provider"],
        "versions": installed_versions(),
        "evaluation_digest": run.data.tags["evaluation_digest"],
        "latency_runs": latency_runs,
    }
    rows = {} if anew else _rows(path, context)
    rows[label(run)] = {
        "name": label(run),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": run.data.tags.get("git_commit"),
        "metrics": run.data.metrics,
    }
    path.write_text(json.dumps(context | {"runs": list(rows.values())}, indent=2) + "\n")
    dates = sorted({row["date"] for row in rows.values()})
    where = f"{context['hardware']}, ONNX Runtime {context['provider']}"
    closing = f"{' to '.join(dates)}, {where}, {len(rows)} runs, {latency_runs} timed runs each."
    text = markdown({name: row["metrics"] for name, row in rows.items()})
    path.with_suffix(".md").write_text(f"{text}\n{closing}\n")
    return text


def _rows(path: Path, context: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The record's runs by name.

    Raises:
        SystemExit: they were measured on something else, so that they do not go into one table.
    """
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    for key, value in context.items():
        if record.get(key) != value:
            raise SystemExit(f"{path}: its {key} is {record.get(key)}, here it is {value}; measure all rows anew")
    return {row["name"]: row for row in record["runs"]}


def markdown(metrics_by_name: dict[str, dict[str, float]]) -> str:
    """One row a run; what was not measured is a dash."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, metrics in metrics_by_name.items():
        cells = [form.format(metrics[key]) if key in metrics else "-" for key, form in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def label(run: Run) -> str:
    """Mode, recipe, and what else of the run's parameters tells it from others."""
    parameters = {name: "" if value == "''" else value for name, value in run.data.params.items()}  # MLflow's empty
    if run.data.tags["entry_point"] == "baseline":
        return f"{parameters['precision']}"
    words = [parameters["mode"].upper(), Path(parameters["recipe"]).stem]
    words += [f"{name}={parameters[name]}" for name in ("avg_bits", "plan_bits") if parameters[name]]
    words += [f"by {parameters['plan_by']}"] if parameters["plan_by"] else []
    return " ".join(words) + f", seed {parameters['seed']}"


if __name__ == "__main__":
    typer.run(main)
