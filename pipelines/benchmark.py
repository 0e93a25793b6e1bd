"""Time an exported ONNX file: latency, who ran what, the best session settings. Needs no pictures."""

from __future__ import annotations

import tempfile
from pathlib import Path

import quantrack.program  # noqa: F401
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import measure_speed
from quantrack.onnx.inspect import file_facts
from quantrack.progress import say
from quantrack.runtime.session import open_given, open_session, require_cuda
from quantrack.runtime.tune import tune
from quantrack.settings import BenchmarkSettings
from quantrack.tracking.log import log_settings
from quantrack.tracking.models import errors_in_terms_of, fetch_onnx, float_file_of, log_given_file, of_a_version
from quantrack.tracking.result import log_benchmark, log_tuning, resolved_by_file


def benchmark(settings: BenchmarkSettings) -> None:
    """Time an ONNX detector (a file, runs:/... or models:/...), in turns with its float32 file where there is one."""
    if settings.require_gpu:
        require_cuda()
    onnx = of_a_version(settings.onnx)
    with tempfile.TemporaryDirectory() as folder:
        path = fetch_onnx(onnx, Path(folder) / "candidate")
        with errors_in_terms_of("onnx", settings.onnx, path):
            session = open_given(path, settings.provider)
            facts = file_facts(path, settings.head, session.imgsz)
        log_settings(settings, f"benchmark-{facts.mode}-{facts.model}", resolved_by_file(settings, facts))
        log_given_file(settings.onnx, onnx, path)
        float_file = settings.baseline or float_file_of(onnx)
        beside = None
        if float_file:
            float_path = fetch_onnx(float_file, Path(folder) / "float32", "baseline")
            with errors_in_terms_of("baseline", float_file, float_path):
                beside = open_given(float_path, settings.provider)
        elif facts.mode != "fp32":
            say("no float32 file is known to time it in turns with; give one by baseline=, or take a run's file")

        if settings.tune:
            trials = tune(path, settings.provider, settings.latency_runs, beside)
            log_tuning(trials)
            session = open_session(path, settings.provider, trials[0].settings)
        speed = measure_speed(session, settings.latency_runs, beside)
        log_benchmark(path, facts, speed)
        if settings.require_gpu:
            speed.placement.require_gpu()


if __name__ == "__main__":
    run_entry_point("benchmark", BenchmarkSettings, benchmark)
