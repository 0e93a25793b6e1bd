"""What each layer's quantization costs, and the bit plan that follows from it under a budget."""

from __future__ import annotations

from functools import partial

import quantrack.program  # noqa: F401
from quantrack.datasets.calibration import load_calibration_set
from quantrack.datasets.coco import load_evaluation_set
from quantrack.detector.device import resolve_device
from quantrack.detector.load import load_detector
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import require_same_classes, score_model
from quantrack.progress import say
from quantrack.quantization.job import new_job
from quantrack.quantization.sensitivity import (
    MEASURES,
    SCORED,
    SensitivityMeasurement,
    cached_sensitivity,
    make_plan,
    measure_score_sensitivity,
)
from quantrack.schemes import parse_mode
from quantrack.settings import SensitivitySettings, parse_plan_bits
from quantrack.tracking.log import log_inputs, log_sensitivity, log_settings


def sensitivity(settings: SensitivitySettings) -> None:
    """Measure what each layer alone costs at few bits, and plan bits under a budget."""
    scheme = parse_mode(settings.mode)
    device = resolve_device(settings.device)
    evaluation_set = load_evaluation_set(settings.data_folder, settings.eval_images)
    calibration = load_calibration_set(
        settings.calibration_list, settings.calib_images, settings.data_folder, settings.seed
    )
    detector = load_detector(settings.model, settings.head, settings.imgsz, settings.seed, settings.trust_checkpoint)
    require_same_classes(detector.class_names, evaluation_set, f"model={settings.model}")
    log_settings(settings, f"sensitivity-{scheme.name}-{detector.name}", {"device": str(device)})
    log_inputs(evaluation_set, calibration)

    job = new_job(detector, scheme, calibration, settings.imgsz, device, settings.seed)
    measurement = SensitivityMeasurement(parse_plan_bits(settings.plan_bits), settings.measure)
    if settings.measure == SCORED:
        say("measure=mAP: the plan is chosen by the evaluation pictures, on which it will look better than on others")
        score = partial(score_model, evaluation_set=evaluation_set, head=settings.head, imgsz=settings.imgsz)
        rows = measure_score_sensitivity(job, measurement, score)
    else:
        rows = cached_sensitivity(job, measurement)
    plan = make_plan(job, rows, settings.avg_bits, settings.chosen_plan_by)
    log_sensitivity(rows, plan, MEASURES[settings.measure])


if __name__ == "__main__":
    run_entry_point("sensitivity", SensitivitySettings, sensitivity)
