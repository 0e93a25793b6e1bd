"""The float detector, exported, run and scored: what every quantized one is held against."""

from __future__ import annotations

from quantrack.datasets.coco import load_evaluation_set
from quantrack.detector.load import load_detector
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import require_same_classes
from quantrack.settings import BaselineSettings
from quantrack.tracking.baseline import FLOAT_RECIPE, measure_baseline
from quantrack.tracking.log import log_settings
from quantrack.tracking.result import detector_facts


def baseline(settings: BaselineSettings) -> None:
    """Export the float detector to ONNX, run it in ONNX Runtime, score it on COCO, log it to MLflow."""
    evaluation_set = load_evaluation_set(settings.data_folder, settings.eval_images)
    detector = load_detector(settings.model, settings.head, settings.imgsz, settings.seed, settings.trust_checkpoint)
    require_same_classes(len(detector.class_names), evaluation_set, settings.model)
    log_settings(settings, f"baseline-{settings.precision}-{detector.name}")

    facts = detector_facts(detector, settings.imgsz, settings.precision, FLOAT_RECIPE)
    measure_baseline(detector, facts, evaluation_set, settings.provider, settings.latency_runs)


if __name__ == "__main__":
    run_entry_point("baseline", BaselineSettings, baseline)
