"""Measure how fast and how large each variant is, timed in turns with float32: the table of docs/runtime.md.

    python benchmarks/runtime_table.py MODEL DATA_ROOT --name yolov10n-cpu

Runs the entry points below in the experiment `runtime-NAME` and writes `benchmarks/results/runtime-NAME.json` and
`.md` with date, hardware and versions. Measure on an idle machine: a run notes how busy others kept it. On CUDA
give `--provider cuda` and another name, which measures what is for CUDA; `--eval-images 8` is enough for an
architecture with random weights. `--tune` also finds each file's fastest session, and times those in turns.
"""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import mlflow
import typer
from mlflow.entities import Run

from quantrack.runtime.latency import measure_in_turns
from quantrack.runtime.session import CUDA, Session, open_session
from quantrack.runtime.tune import tune
from quantrack.schemes import Variant
from quantrack.tracking.environment import cpu_name, device_name, installed_versions
from quantrack.tracking.models import fetch_onnx

ROOT = Path(__file__).resolve().parents[1]
Case = tuple[str, dict[str, str]]
CPU_CASES: tuple[Case, ...] = (
    ("baseline", {"precision": "fp32"}),
    ("baseline", {"precision": "fp16"}),
    ("ptq", {"mode": "w8a8"}),
    ("ptq", {"mode": "w8a8", "placement": "full"}),
    ("ptq", {"mode": "w8a16"}),
    ("ptq", {"mode": "w4a8"}),
    ("ptq", {"mode": "w4a8", "placement": "full"}),
    ("ptq", {"mode": "w4a8", "weight_storage": "int4"}),
    ("ptq", {"mode": "w4a8", "placement": "full", "weight_storage": "int4"}),
    ("ptq", {"mode": "w4a16"}),
    ("ptq", {"mode": "w4a16", "weight_storage": "int4"}),
    ("ptq", {"mode": "w4a16", "weight_storage": "int4", "precision": "fp16"}),
)
CUDA_CASES: tuple[Case, ...] = (
    ("baseline", {"precision": "fp32"}),
    ("baseline", {"precision": "fp16"}),
    ("ptq", {"mode": "w8a16"}),
    ("ptq", {"mode": "w8a8"}),
    ("ptq", {"mode": "w8a8", "precision": "fp16"}),
    ("ptq", {"mode": "w4a16"}),
    ("ptq", {"mode": "w4a16", "weight_storage": "int4", "precision": "fp16"}),
    ("ptq", {"mode": "w4a8"}),
    ("ptq", {"mode": "w4a8", "weight_storage": "int4", "precision": "fp16"}),
)
COLUMNS = (
    ("mAP50-95", "mAP50-95", "{:.4f}"),
    ("drop, points", "mAP50-95_drop", "{:.2f}"),
    ("agreement", "float32_agreement", "{:.3f}"),
    ("latency p50, ms", "latency_ms_p50", "{:.2f}"),
    ("x float32", "latency_ratio", "{:.3f}"),
    ("from", "latency_ratio_ci_low", "{:.3f}"),
    ("to", "latency_ratio_ci_high", "{:.3f}"),
    ("file, MB", "onnx_mb", "{:.2f}"),
    ("x float32 file", "file_ratio", "{:.3f}"),
    ("integer kernels", "nodes_int8_compute", "{:.0f}"),
    ("parity", "parity_mean_abs", "{:.4f}"),
    ("peak memory, MB", "peak_rss_mb", "{:.0f}"),
    ("others' cores", "busy_cores_of_others", "{:.2f}"),
)
TUNED_COLUMNS = (
    ("tuned p50, ms", "tuned_ms_p50", "{:.2f}"),
    ("x tuned float32", "tuned_ratio", "{:.3f}"),
    ("from", "tuned_ratio_ci_low", "{:.3f}"),
    ("to", "tuned_ratio_ci_high", "{:.3f}"),
)
TUNING_RUNS = 100


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint, as for the entry points.")],
    data_root: Annotated[str, typer.Argument(help="Data root, as for the entry points.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    provider: Annotated[str, typer.Option(help="ONNX Runtime provider.")] = "auto",
    eval_images: Annotated[int, typer.Option(help="Evaluation pictures.")] = 100,
    recipe: Annotated[str, typer.Option(help="Recipe of the quantized runs.")] = "default",
    latency_runs: Annotated[int, typer.Option(help="Timed runs of each file, in turns of ten.")] = 400,
    tuned: Annotated[bool, typer.Option("--tune", help="Time each file's fastest session as well.")] = False,
) -> None:
    """Measure all variants and write the table; what is finished stays, should a later run fail."""
    shared = {
        "model": model, "data_root": data_root, "provider": provider, "eval_images": str(eval_images),
        "latency_runs": str(latency_runs),
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    float_session: Session | None = None
    for entry_point, parameters in CUDA_CASES if provider == CUDA else CPU_CASES:
        own = parameters | ({"recipe": recipe} if entry_point == "ptq" else {})
        submitted = mlflow.projects.run(
            str(ROOT), entry_point, parameters=shared | own, env_manager="local", experiment_name=f"runtime-{name}"
        )
        run = mlflow.get_run(submitted.run_id)
        float_mb = float(rows[0]["metrics"]["onnx_mb"]) if rows else run.data.metrics["onnx_mb"]  # type: ignore[index]
        rows.append(row(run, float_mb))
        if tuned:
            session, found = fastest(run, float_session)
            float_session = float_session or session
            rows[-1] |= found
        text = write(name, run, rows)
    print(text)


def row(run: Run, float_mb: float) -> dict[str, object]:
    """What the record keeps of a run."""
    tags, metrics = run.data.tags, run.data.metrics
    label = " ".join([tags["mode"].upper(), *Variant.of(tags).words])
    return {
        "name": label,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": tags.get("git_commit"),
        "session": tags["session_settings"],
        "metrics": metrics | {"file_ratio": metrics["onnx_mb"] / float_mb},
    }


def fastest(run: Run, float_session: Session | None) -> tuple[Session, dict[str, object]]:
    """The session of a run's file that took the least time, and how long it takes in turns with float32's fastest."""
    with tempfile.TemporaryDirectory() as folder:
        path = fetch_onnx(f"runs:/{run.info.run_id}/onnx", Path(folder))
        provider = run.data.tags["provider"]
        trials = tune(path, provider, TUNING_RUNS, None)
        session = open_session(path, provider, trials[0].settings)
    latencies, ratios = measure_in_turns([float_session, session] if float_session else [session], TUNING_RUNS)
    ratio = ratios[-1]
    metrics = {"tuned_ms_p50": latencies[-1].p50}
    if float_session:
        metrics |= {name.replace("latency", "tuned"): value for name, value in ratio.metrics().items()}
    tried = {trial.settings.text: trial.latency.p50 for trial in trials}
    return session, {"tuned_session": session.settings.text, "tuned": metrics, "tried_ms_p50": tried}


def write(name: str, run: Run, rows: list[dict[str, object]]) -> str:
    """Write the record and the table; returns the table."""
    provider = run.data.tags["provider"]
    context = {
        "hardware": device_name(provider), "cpu": cpu_name(), "provider": provider, "versions": installed_versions(),
        "evaluation_digest": run.data.tags["evaluation_digest"], "latency_runs": run.data.params["latency_runs"],
    }  # fmt: skip
    base = ROOT / f"benchmarks/results/runtime-{name}"
    base.with_suffix(".json").write_text(json.dumps(context | {"runs": rows}, indent=2) + "\n")
    lines = table(rows, "session", "metrics", COLUMNS)
    if "tuned" in rows[0]:
        lines += ["", *table(rows, "tuned_session", "tuned", TUNED_COLUMNS)]
    where = f"{context['hardware']}, ONNX Runtime {provider}, {context['latency_runs']} timed runs each"
    lines += ["", f"{rows[-1]['date']}, {where}."]
    text = "\n".join(lines) + "\n"
    base.with_suffix(".md").write_text(text)
    return text


def table(
    rows: list[dict[str, object]], session: str, measured: str, columns: tuple[tuple[str, str, str], ...]
) -> list[str]:
    """One line a run: its name, its session's settings, and what was measured with them."""
    lines = ["| run | session | " + " | ".join(title for title, _, _ in columns) + " |"]
    lines += ["| --- | --- |" + " ---: |" * len(columns)]
    for one in rows:
        metrics: dict[str, float] = one[measured]  # type: ignore[assignment]
        cells = [form.format(metrics[key]) if key in metrics else "-" for _, key, form in columns]
        lines.append("| " + " | ".join([str(one["name"]), str(one[session]), *cells]) + " |")
    return lines


if __name__ == "__main__":
    typer.run(main)
