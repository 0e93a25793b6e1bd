"""`summary.md` and the run's description: the result in a few lines that say on what."""

from __future__ import annotations

from collections.abc import Mapping

import mlflow

from quantrack.comparison.runs import AGREEMENT
from quantrack.progress import say
from quantrack.tracking.log import log_description
from quantrack.tracking.read import active_run_id

ROWS = (
    ("mAP50-95", "mAP50-95", "{:.4f}"),
    ("mAP50", "mAP50", "{:.4f}"),
    ("mAP50-95_drop", "drop against float32 (points)", "{:.2f}"),
    ("mAP50-95_drop_ci_low", "drop, lower end of its 95 % interval", "{:.2f}"),
    ("mAP50-95_drop_ci_high", "drop, upper end of its 95 % interval", "{:.2f}"),
    (AGREEMENT, "agreement with float32's detections", "{:.3f}"),
    ("weight_bits_avg", "average weight bits", "{:.2f}"),
    ("latency_ms_p50", "median latency (ms)", "{:.1f}"),
    ("latency_ratio", "latency, times float32's in turns", "{:.2f}"),
    ("onnx_mb", "file (MB)", "{:.2f}"),
    ("parity_mean_abs", "mean difference to the reference", "{:.2e}"),
)


def summary_text(title: str, measured_on: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    """A Markdown table of what was measured; what was not is left out."""
    context = "; ".join(f"{name} {value}" for name, value in measured_on.items())
    metrics = _without_itself(metrics)
    lines = [f"# {title}", "", f"Measured on {context}.", "", "| metric | value |", "| --- | --- |"]
    lines += [f"| {label} | {form.format(metrics[name])} |" for name, label, form in ROWS if name in metrics]
    return "\n".join(lines) + "\n"


def headline(title: str, metrics: Mapping[str, float]) -> str:
    """The result in one line; what was not measured is left out.

    >>> headline("yolov10n w4a8", {"mAP50-95": 0.46, "mAP50-95_drop": 0.68, "latency_ms_p50": 26.84, "onnx_mb": 2.772})
    'yolov10n w4a8: mAP50-95 0.4600, 0.68 points below float32, 26.8 ms, 2.77 MB'
    """
    known = _without_itself(metrics)
    parts = [f"mAP50-95 {known['mAP50-95']:.4f}"] if "mAP50-95" in known else []
    if "mAP50-95_drop" in known:
        parts.append(_drop_text(known))
    if "latency_ms_p50" in known:
        ratio = f" ({known['latency_ratio']:.2f} x float32)" if "latency_ratio" in known else ""
        parts.append(f"{known['latency_ms_p50']:.1f} ms{ratio}")
    parts += [f"{known['onnx_mb']:.2f} MB"] if "onnx_mb" in known else []
    return f"{title}: {', '.join(parts)}"


def _drop_text(known: Mapping[str, float]) -> str:
    drop = known["mAP50-95_drop"]
    ends = [known[end] for end in ("mAP50-95_drop_ci_low", "mAP50-95_drop_ci_high") if end in known]
    interval = f"{ends[0]:.2f} to {ends[1]:.2f}" if len(ends) == 2 else ""
    if drop < 0:
        return f"{-drop:.2f} points above float32" + (f" (drop {interval})" if interval else "")
    return f"{drop:.2f} points below float32" + (f" ({interval})" if interval else "")


def _without_itself(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Without what float32 is to itself, which no one measured."""
    own = {"mAP50-95_drop": 0.0, "latency_ratio": 1.0}
    of_itself = all(metrics.get(name) == value for name, value in own.items())
    return {name: value for name, value in metrics.items() if name not in (*own, AGREEMENT)} if of_itself else metrics


def log_summary(title: str, measured_on: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    """Log the summary as an artifact and as the run's description, and tell the user its main line."""
    text = summary_text(title, measured_on, metrics)
    mlflow.log_text(text, "summary.md")
    log_description(text, "summary.md")
    say(f"{headline(title, metrics)} (run {active_run_id()})")
