"""Measure what training gives over the PTQ run that it starts from, with distillation and without.

    python benchmarks/qat_table.py MODEL DATA_ROOT --name yolov10n-343 --recipe best --avg-bits 4.5 --epochs 10

Runs `ptq` and `qat` in the experiment `qat-NAME` and writes `benchmarks/results/qat-NAME.json` and `.md` with date,
hardware and versions after each run.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import mlflow
import typer
from mlflow.entities import Run

from quantrack.tracking.environment import cpu_name, installed_versions

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    ("bits", "weight_bits_avg", "{:.2f}"),
    ("mAP50-95", "mAP50-95", "{:.4f}"),
    ("drop, points", "mAP50-95_drop", "{:.2f}"),
    ("agreement", "float32_agreement", "{:.3f}"),
    ("gain over PTQ, points", "mAP50-95_gain", "{:.2f}"),
    ("from", "mAP50-95_gain_ci_low", "{:.2f}"),
    ("to", "mAP50-95_gain_ci_high", "{:.2f}"),
    ("best epoch", "best_epoch", "{:.0f}"),
    ("held back, best", "best_validation", "{:.4f}"),
    ("minutes", "minutes", "{:.1f}"),
)


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint, as for the entry points.")],
    data_root: Annotated[str, typer.Argument(help="Data root, as for the entry points.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    mode: Annotated[str, typer.Option(help="Mode.")] = "w4a8",
    recipe: Annotated[str, typer.Option(help="Recipe of the PTQ run.")] = "best",
    avg_bits: Annotated[str, typer.Option(help="Bits of the PTQ run's plan; 0 = by role.")] = "0.0",
    epochs: Annotated[str, typer.Option(help="Epochs.")] = "10",
    batch: Annotated[str, typer.Option(help="Pictures in a step.")] = "8",
    lr0: Annotated[str, typer.Option(help="First rate of weights.")] = "0.001",
    amp: Annotated[str, typer.Option(help="Train in bfloat16.")] = "false",
    distill_weights: Annotated[str, typer.Option(help="Weights to train with, separated by commas.")] = "3.0,0.0",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1",
) -> None:
    """Measure all and write the table; what is finished stays, should a later run fail."""
    rows: list[dict[str, object]] = []
    training = {"epochs": epochs, "batch": batch, "lr0": lr0, "amp": amp}
    for seed in seeds.split(","):
        shared = {"model": model, "data_root": data_root, "mode": mode, "recipe": recipe, "seed": seed}
        start = measured("ptq", shared | {"avg_bits": avg_bits}, name)
        rows.append(row(start, f"PTQ, {recipe}, seed {seed}"))
        for weight in distill_weights.split(","):
            own = training | {"from_run": start.info.run_id, "distill_weight": weight}
            run = measured("qat", shared | own, name)
            rows.append(row(run, f"QAT, {epochs} epochs, distill_weight {weight}, seed {seed}"))
            write(name, run, rows, training)
    print((ROOT / f"benchmarks/results/qat-{name}.md").read_text())


def measured(entry_point: str, parameters: dict[str, str], name: str) -> Run:
    """The finished run of an entry point, as `mlflow run` makes it."""
    submitted = mlflow.projects.run(
        str(ROOT), entry_point, parameters=parameters, env_manager="local", experiment_name=f"qat-{name}"
    )
    return mlflow.get_run(submitted.run_id)


def row(run: Run, label: str) -> dict[str, object]:
    """What the record keeps of a run."""
    minutes = (run.info.end_time - run.info.start_time) / 60_000
    date = datetime.now(UTC).date().isoformat()
    return {"name": label, "date": date, "metrics": run.data.metrics | {"minutes": minutes}}


def write(name: str, run: Run, rows: list[dict[str, object]], training: dict[str, str]) -> None:
    """Write the record and the table."""
    context = {
        "cpu": cpu_name(), "device": run.data.params["device_resolved"], "training": training,
        "versions": installed_versions(), "evaluation_digest": run.data.tags["evaluation_digest"],
        "training_digest": run.data.tags["training_digest"],
    }  # fmt: skip
    base = ROOT / f"benchmarks/results/qat-{name}"
    base.with_suffix(".json").write_text(json.dumps(context | {"runs": rows}, indent=2) + "\n")
    lines = ["| run | " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    lines += ["| --- |" + " ---: |" * len(COLUMNS)]
    for one in rows:
        metrics: dict[str, float] = one["metrics"]  # type: ignore[assignment]
        cells = [form.format(metrics[key]) if key in metrics else "-" for _, key, form in COLUMNS]
        lines.append("| " + " | ".join([str(one["name"]), *cells]) + " |")
    settings = ", ".join(f"{key}={value}" for key, value in training.items())
    lines += ["", f"{rows[-1]['date']}, {context['cpu']}, trained on {context['device']}, {settings}."]
    base.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
