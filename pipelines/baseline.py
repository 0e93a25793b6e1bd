"""The float detector, exported, run and scored: what every quantized one is held against."""

from __future__ import annotations

import quantrack.program  # noqa: F401
from quantrack.datasets.coco import load_evaluation_set
from quantrack.detector.load import load_detector
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import require_same_classes
from quantrack.runtime.session import require_cuda
from quantrack.runtime.variants import warn_of_float16
from quantrack.settings import BaselineSettings
from quantrack.tracking.baseline import find_or_measure_baseline, measure_baseline
from quantrack.tracking.log import log_settings
from quantrack.tracking.run_digest import log_run_digest


def baseline(settings: BaselineSettings) -> None:
    """Export the float detector to ONNX, run it in ONNX Runtime, score it on COCO, log it to MLflow."""
    if settings.require_gpu:
        require_cuda()
    evaluation_set = load_evaluation_set(settings.data_folder, settings.eval_images)
    detector = load_detector(settings.model, settings.head, settings.imgsz, settings.seed, settings.trust_checkpoint)
    require_same_classes(detector.class_names, evaluation_set, f"model={settings.model}")
    log_settings(settings, f"baseline-{settings.precision}-{detector.name}")
    log_run_digest(settings, detector, evaluation_set, None)

    reference = None
    if settings.precision == "fp16":
        warn_of_float16(settings.provider)
        reference = find_or_measure_baseline(detector, evaluation_set, BaselineSettings.like(settings))
    _, proof = measure_baseline(detector, evaluation_set, settings, reference)
    if settings.require_gpu:
        proof.speed.placement.require_gpu()


if __name__ == "__main__":
    run_entry_point("baseline", BaselineSettings, baseline)
