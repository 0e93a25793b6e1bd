"""Prove a quantized model and log it: what every entry point that makes one has in common."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import mlflow

from quantrack.datasets.coco import EvaluationSet
from quantrack.detector.load import Detector
from quantrack.evaluation.measure import Proof, prove
from quantrack.onnx.exported_files import export_quantized_files
from quantrack.quantization.job import QuantizationJob, StepReport
from quantrack.quantization.state import save_quantized
from quantrack.runtime.session import open_session
from quantrack.runtime.variants import make_variant, reference_for
from quantrack.settings import BaselineSettings, PtqSettings
from quantrack.tracking.baseline import find_or_measure_baseline
from quantrack.tracking.log import log_quantization, log_samples, step_totals
from quantrack.tracking.result import detector_facts, log_result

QUANTIZED_STATE = "quantized.pt"


def prove_and_log(
    job: QuantizationJob,
    detector: Detector,
    evaluation_set: EvaluationSet,
    settings: PtqSettings,
    reports: Sequence[StepReport],
    recipe: str,
) -> Proof:
    """Export the job's model, measure it beside the float32 baseline, log all of it; the proof.

    Raises:
        QuantrackError: the export fails.
    """
    quantized = log_quantization(job, reports, settings.weight_storage)
    if settings.method == PtqSettings.method:  # of a training they say nothing
        quantized |= step_totals(reports)
    plain = detector_facts(detector, evaluation_set, settings.imgsz, job.scheme.name, recipe)
    bits = quantized["weight_bits_avg"]
    facts = replace(plain, weight_bits_avg=bits, method=settings.method, **asdict(settings.variant))
    with tempfile.TemporaryDirectory() as folder:
        _log_state(job, Path(folder))
        exported = export_quantized_files(job.model, facts, Path(folder))
        files = make_variant(exported, facts, job.calibration, settings.provider)
        session = open_session(files.optimized, settings.provider)
        float32 = replace(BaselineSettings.like(settings), provider=session.provider)  # what `auto` came to
        baseline = find_or_measure_baseline(detector, evaluation_set, float32)
        reference = reference_for(files, facts, job.model, settings.provider)
        beside = baseline.open(settings.provider, Path(folder) / "float32")
        proof = prove(session, evaluation_set, settings.head, settings.latency_runs, reference, beside)
        log_result(files, facts, proof, evaluation_set, quantized | baseline.compared(proof, evaluation_set))
    log_samples(evaluation_set, baseline.detections, proof.detections)
    return proof


def _log_state(job: QuantizationJob, folder: Path) -> None:
    """`quantized.pt`, which `qat -P from_run=` starts from."""
    path = folder / QUANTIZED_STATE
    save_quantized(path, job.model)
    mlflow.log_artifact(str(path))
