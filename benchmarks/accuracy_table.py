"""Measure every mode through `mlflow run` and write the results table of the README.

    python benchmarks/accuracy_table.py MODEL DATA_ROOT --name yolov10n-val100

Runs each entry point below in the experiment `accuracy-NAME` (in `mlflow.db` here, as `mlflow ui`
shows it), then writes `benchmarks/results/NAME.json` and `.md` with date, hardware and versions.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import mlflow
import typer
from mlflow.entities import Run

from quantrack.settings import PtqSettings, default_texts
from quantrack.tracking.environment import cpu_name, device_name, installed_versions

ROOT = Path(__file__).resolve().parents[1]
STRICT = "benchmarks/recipes/strict.yaml"  # every convolution but DFL's at 4 bits
PLANNED = {"recipe": "best", "avg_bits": "4.5"}
# W4 draws positions at random, so what is held against a target is measured with two seeds.
TWICE = (
    {"mode": "w4a16"} | PLANNED,
    {"mode": "w4a8"} | PLANNED,
    {"mode": "w4a8"} | PLANNED | {"avg_bits": "4.1"},
    {"mode": "w4a8", "recipe": STRICT},
)
ONCE = (
    {"mode": "w4a8"} | PLANNED | {"recipe": "default"},
    {"mode": "w4a8", "recipe": "fast"},
    {"mode": "w8a8", "recipe": "naive"},
    {"mode": "w4a8", "recipe": "naive"},
    {"mode": "w4a8"} | PLANNED | {"plan_bits": "4,8"},
)
CASES = (
    ("baseline", {"precision": "fp32"}),
    ("baseline", {"precision": "fp16"}),
    ("ptq", {"mode": "w8a16", "recipe": "default"}),
    ("ptq", {"mode": "w8a8", "recipe": "default"}),
    *(("ptq", case | {"seed": "0"}) for case in TWICE),
    *(("ptq", case) for case in ONCE),
    *(("ptq", case | {"seed": "1"}) for case in TWICE),
)
PLAN_BITS = default_texts(PtqSettings)["plan_bits"]
COLUMNS = (
    ("mAP50-95", "{:.4f}"),
    ("mAP50", "{:.4f}"),
    ("mAP50-95_drop", "{:.2f}"),
    ("mAP50-95_drop_ci_low", "{:.1f}"),
    ("mAP50-95_drop_ci_high", "{:.1f}"),
    ("weight_bits_avg", "{:.2f}"),
    ("weight_bits_stored_avg", "{:.2f}"),
    ("onnx_mb", "{:.2f}"),
    ("latency_ms_p50", "{:.1f}"),
    ("quantize_seconds", "{:.0f}"),
)
HEADER = (
    "run",
    "mAP50-95",
    "mAP50",
    "drop, points",
    "from",
    "to",
    "weight bits",
    "stored",
    "file, MB",
    "latency p50, ms",
    "quantize, s",
)


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint, as for the entry points.")],
    data_root: Annotated[str, typer.Argument(help="Data root, as for the entry points.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    latency_runs: Annotated[int, typer.Option(help="Timed runs each.")] = 100,
) -> None:
    """Measure all cases and write the table."""
    shared = {"model": model, "data_root": data_root, "latency_runs": str(latency_runs)}
    runs = []
    for entry_point, parameters in CASES:
        submitted = mlflow.projects.run(
            str(ROOT), entry_point, parameters=shared | parameters, env_manager="local",
            experiment_name=f"accuracy-{name}",
        )  # fmt: skip
        runs.append(mlflow.get_run(submitted.run_id))
        write_results(runs, name, latency_runs)  # what is finished stays, should a later run fail
    print(markdown(runs))


def write_results(runs: list[Run], name: str, latency_runs: int) -> None:
    """The record and the table of the runs so far."""
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": device_name(runs[0].data.tags["provider"]),
        "cpu": cpu_name(),
        "provider": runs[0].data.tags["provider"],
        "versions": installed_versions(),
        "evaluation_digest": runs[0].data.tags["evaluation_digest"],
        "runs": [{"name": label(run), "metrics": run.data.metrics} for run in runs],
    }
    folder = ROOT / "benchmarks/results"
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    context = f"{record['date']}, {record['hardware']}, ONNX Runtime {record['provider']}"
    text = f"{markdown(runs)}\n{context}, {len(runs)} runs, {latency_runs} timed runs each.\n"
    (folder / f"{name}.md").write_text(text)


def markdown(runs: list[Run]) -> str:
    """One row a run; what was not measured is a dash."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for run in runs:
        metrics = run.data.metrics
        cells = [form.format(metrics[key]) if key in metrics else "-" for key, form in COLUMNS]
        lines.append(f"| {label(run)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def label(run: Run) -> str:
    """Mode, recipe, and what else of the run's parameters tells it from others."""
    parameters = run.data.params
    if "precision" in parameters:
        return f"{parameters['precision']}"
    words = [parameters["mode"].upper(), Path(parameters["recipe"]).stem]
    if float(parameters["avg_bits"]):
        words.append(f"avg_bits={parameters['avg_bits']}")
        words += [f"plan_bits={parameters['plan_bits']}"] if parameters["plan_bits"] != PLAN_BITS else []
    return " ".join(words) + f", seed {parameters['seed']}"


if __name__ == "__main__":
    typer.run(main)
