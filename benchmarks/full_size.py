"""How long a recipe takes on an architecture of full size, and how much memory: docs/accuracy.md's YOLOv10m.

    python benchmarks/full_size.py yolov10m.yaml DATA_ROOT --name yolov10m-cpu

Weights are random, so accuracy says nothing and is left out. Every step is done anew, in a cache of its own. Writes
`benchmarks/results/full-size-NAME.json` and `.md`.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

import mlflow
import typer
from accuracy_table import ROOT
from mlflow.entities import Run

from quantrack.cache import fresh_cache
from quantrack.tracking.environment import cpu_name, device_name, installed_versions

PICTURES, LATENCY_RUNS = "5", "20"  # to evaluate and to time: what is measured here comes before
KEPT = ("quantize_seconds", "peak_rss_mb", "onnx_mb", "weight_bits_avg", "latency_ms_p50", "latency_ratio")
BYTES_PER_MB, BYTES_PER_GIB = 1_000_000, 2**30


def main(
    model: Annotated[str, typer.Argument(help="An architecture, *.yaml.")],
    data_root: Annotated[str, typer.Argument(help="Data root, as for the entry points.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    mode: Annotated[str, typer.Option(help="w8a16, w8a8, w4a16 or w4a8.")] = "w4a8",
    recipe: Annotated[str, typer.Option(help="As for `ptq`.")] = "default",
) -> None:
    """Quantize the architecture once, and write what it took."""
    parameters = {"model": model, "mode": mode, "recipe": recipe, "eval_images": PICTURES, "latency_runs": LATENCY_RUNS}
    with fresh_cache():
        submitted = mlflow.projects.run(
            str(ROOT), "ptq", parameters=parameters | {"data_root": data_root}, env_manager="local",
            experiment_name=f"full-size-{name}",
        )  # fmt: skip
    print(write(mlflow.get_run(submitted.run_id), name, parameters))


def write(run: Run, name: str, parameters: dict[str, str]) -> str:
    """Write the record and the table; returns the table."""
    metrics = run.data.metrics
    prefix, suffix = "steps/", "/seconds"
    steps = {
        key.removeprefix(prefix).removesuffix(suffix): value
        for key, value in sorted(metrics.items())
        if key.startswith(prefix) and key.endswith(suffix)
    }
    record = {
        "date": datetime.now(UTC).date().isoformat(), "commit": run.data.tags.get("git_commit"), "cpu": cpu_name(),
        "hardware": device_name(run.data.tags["provider"]), "versions": installed_versions(),
        "parameters": parameters, "steps_seconds": steps, "metrics": {key: metrics[key] for key in KEPT},
    }  # fmt: skip
    base = ROOT / f"benchmarks/results/full-size-{name}"
    base.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [
        "| step | seconds |",
        "| --- | ---: |",
        *(f"| {step} | {seconds:.0f} |" for step, seconds in steps.items()),
    ]
    memory = metrics["peak_rss_mb"] * BYTES_PER_MB / BYTES_PER_GIB
    lines += ["", f"{metrics['quantize_seconds']:.0f} s in all, {memory:.2f} GiB at most."]
    lines += [
        f"{record['date']}, {record['hardware']}, {parameters['model']} {parameters['mode']} {parameters['recipe']}."
    ]
    text = "\n".join(lines) + "\n"
    base.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    typer.run(main)
