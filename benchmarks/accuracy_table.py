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

from quantrack.tracking.environment import cpu_name, device_name, installed_versions

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    ("baseline", {"precision": "fp32"}),
    ("baseline", {"precision": "fp16"}),
    ("ptq", {"mode": "w8a16", "recipe": "default"}),
    ("ptq", {"mode": "w8a8", "recipe": "default"}),
    ("ptq", {"mode": "w4a16", "recipe": "default"}),
    ("ptq", {"mode": "w4a8", "recipe": "default"}),
    ("ptq", {"mode": "w4a16", "recipe": "default", "avg_bits": "4.5"}),
    ("ptq", {"mode": "w4a8", "recipe": "default", "avg_bits": "4.5"}),
    ("ptq", {"mode": "w4a8", "recipe": "best", "avg_bits": "4.5"}),
    ("ptq", {"mode": "w4a8", "recipe": "fast"}),
    ("ptq", {"mode": "w8a8", "recipe": "naive"}),
    ("ptq", {"mode": "w4a8", "recipe": "naive"}),
)
COLUMNS = (
    ("mAP50-95", "{:.4f}"),
    ("mAP50", "{:.4f}"),
    ("mAP50-95_drop", "{:.2f}"),
    ("mAP50-95_drop_ci_low", "{:.1f}"),
    ("mAP50-95_drop_ci_high", "{:.1f}"),
    ("weight_bits_avg", "{:.2f}"),
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
    table = markdown(runs)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": device_name(runs[0].data.tags["provider"]),
        "cpu": cpu_name(),
        "provider": runs[0].data.tags["provider"],
        "versions": installed_versions(),
        "evaluation_digest": runs[0].data.tags["evaluation_digest"],
        "runs": [{"name": run.info.run_name, "metrics": run.data.metrics} for run in runs],
    }
    folder = ROOT / "benchmarks/results"
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    context = f"{record['date']}, {record['hardware']}, ONNX Runtime {record['provider']}"
    (folder / f"{name}.md").write_text(f"{table}\n{context}, {len(runs)} runs, {latency_runs} timed runs each.\n")
    print(table)


def markdown(runs: list[Run]) -> str:
    """One row a run; what was not measured is a dash."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for run in runs:
        metrics = run.data.metrics
        cells = [form.format(metrics[key]) if key in metrics else "-" for key, form in COLUMNS]
        lines.append(f"| {run.info.run_name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
