"""Score an exported ONNX file, wherever it came from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import quantrack.program  # noqa: F401
from quantrack.datasets.coco import load_evaluation_set
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import prove, require_output, require_same_classes
from quantrack.onnx.inspect import file_facts
from quantrack.runtime.session import open_given, require_cuda
from quantrack.settings import OnnxSettings
from quantrack.tracking.baseline import find_baseline, log_baseline
from quantrack.tracking.log import log_inputs, log_samples, log_settings
from quantrack.tracking.models import errors_in_terms_of, fetch_onnx, log_given_file, of_a_version
from quantrack.tracking.result import comparison_key, log_evaluation, resolved_by_file


def evaluate(settings: OnnxSettings) -> None:
    """Run an ONNX detector (a file, runs:/... or models:/...) on COCO and log its metrics to MLflow."""
    if settings.require_gpu:
        require_cuda()
    evaluation_set = load_evaluation_set(settings.data_folder, settings.eval_images)
    onnx = of_a_version(settings.onnx)
    with tempfile.TemporaryDirectory() as folder:
        path = fetch_onnx(onnx, Path(folder))
        with errors_in_terms_of("onnx", settings.onnx, path):
            session = open_given(path, settings.provider)
            require_output(session, settings.head, evaluation_set)
            facts = file_facts(path, settings.head, session.imgsz)
            if facts.class_names:
                require_same_classes(facts.class_names, evaluation_set, f"onnx={path}")
        log_settings(settings, f"evaluate-{facts.mode}-{facts.model}", resolved_by_file(settings, facts))
        log_given_file(settings.onnx, onnx, path)
        log_inputs(evaluation_set, None)

        baseline = find_baseline(comparison_key(facts, evaluation_set, session.provider))
        if baseline:
            log_baseline(baseline)
        beside = baseline.open(settings.provider, Path(folder) / "float32") if baseline else None
        # Without the PyTorch model there is no parity to measure; it stays absent.
        proof = prove(session, evaluation_set, settings.head, settings.latency_runs, None, beside)
        further = baseline.compared(proof, evaluation_set) if baseline else {}
        log_evaluation(path, facts, proof, evaluation_set, further)
    log_samples(evaluation_set, baseline.detections if baseline else None, proof.detections)
    if settings.require_gpu:
        proof.speed.placement.require_gpu()


if __name__ == "__main__":
    run_entry_point("evaluate", OnnxSettings, evaluate)
