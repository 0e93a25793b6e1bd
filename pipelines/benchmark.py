"""Time an exported ONNX file: latency percentiles, node counts, who ran what. Needs no pictures."""

from __future__ import annotations

import tempfile
from pathlib import Path

from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import measure_speed
from quantrack.onnx.inspect import file_facts
from quantrack.runtime.session import open_session
from quantrack.settings import OnnxSettings
from quantrack.tracking.log import log_settings
from quantrack.tracking.models import fetch_onnx
from quantrack.tracking.result import log_benchmark


def benchmark(settings: OnnxSettings) -> None:
    """Time an ONNX detector (a file, runs:/... or models:/...) and log latency and placement to MLflow."""
    with tempfile.TemporaryDirectory() as folder:
        path = fetch_onnx(settings.onnx, Path(folder))
        session = open_session(path, settings.provider)
        facts = file_facts(path, settings.head, session.imgsz)
        log_settings(settings, f"benchmark-{facts.mode}-{facts.model}", {"imgsz": session.imgsz})

        speed = measure_speed(session, settings.latency_runs)
        log_benchmark(path, facts, speed)


if __name__ == "__main__":
    run_entry_point("benchmark", OnnxSettings, benchmark)
