"""`summary.md` and the run's description: the result in a few lines that say on what."""

from __future__ import annotations

from collections.abc import Mapping

import mlflow

ROWS = (
    ("mAP50-95", "mAP50-95", "{:.4f}"),
    ("mAP50", "mAP50", "{:.4f}"),
    ("mAP50-95_drop", "drop against float32 (points)", "{:.2f}"),
    ("mAP50-95_drop_ci_low", "drop, lower end of its 95 % interval", "{:.2f}"),
    ("mAP50-95_drop_ci_high", "drop, upper end of its 95 % interval", "{:.2f}"),
    ("weight_bits_avg", "average weight bits", "{:.2f}"),
    ("latency_ms_p50", "median latency (ms)", "{:.1f}"),
    ("onnx_mb", "file (MB)", "{:.2f}"),
    ("parity_mean_abs", "mean difference to the reference", "{:.2e}"),
)


def summary_text(title: str, measured_on: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    """A Markdown table of what was measured; what was not is left out."""
    context = "; ".join(f"{name} {value}" for name, value in measured_on.items())
    lines = [f"# {title}", "", f"Measured on {context}.", "", "| metric | value |", "| --- | --- |"]
    lines += [f"| {label} | {form.format(metrics[name])} |" for name, label, form in ROWS if name in metrics]
    return "\n".join(lines) + "\n"


def log_summary(title: str, measured_on: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    """Log the summary as an artifact and as the run's description."""
    text = summary_text(title, measured_on, metrics)
    mlflow.log_text(text, "summary.md")
    mlflow.set_tag("mlflow.note.content", text)
