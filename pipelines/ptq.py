"""Post-training quantization, proved: calibrate, quantize, export QCDQ ONNX, run, score, log."""

from __future__ import annotations

import quantrack.program  # noqa: F401
from quantrack.datasets.calibration import load_calibration_set
from quantrack.datasets.coco import load_evaluation_set
from quantrack.detector.device import resolve_device
from quantrack.detector.load import load_detector
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import require_same_classes
from quantrack.quantization.apply import apply_recipe, require_quantized
from quantrack.quantization.job import new_job
from quantrack.runtime.session import require_cuda
from quantrack.schemes import parse_mode
from quantrack.settings import PtqSettings
from quantrack.tracking.log import log_inputs, log_recipe, log_settings, log_step
from quantrack.tracking.models import fetch_plan
from quantrack.tracking.quantized import prove_and_log
from quantrack.tracking.run_digest import log_run_digest


def ptq(settings: PtqSettings) -> None:
    """Quantize a detector to low bits, export it as QCDQ ONNX, and prove it in ONNX Runtime on COCO."""
    scheme = parse_mode(settings.mode)
    recipe = settings.chosen_recipe
    device = resolve_device(settings.device)
    if settings.require_gpu:
        require_cuda()
    evaluation_set = load_evaluation_set(settings.data_folder, settings.eval_images)
    calibration = load_calibration_set(
        settings.calibration_list, settings.calib_images, settings.data_folder, settings.seed
    )
    detector = load_detector(settings.model, settings.head, settings.imgsz, settings.seed, settings.trust_checkpoint)
    require_same_classes(detector.class_names, evaluation_set, f"model={settings.model}")
    log_settings(settings, f"ptq-{settings.mode_and_variant}-{recipe.name}-{detector.name}", {"device": str(device)})
    log_inputs(evaluation_set, calibration)
    log_run_digest(settings, detector, evaluation_set, calibration)

    job = new_job(detector, scheme, calibration, settings.imgsz, device, settings.seed)
    job.plan = fetch_plan(settings.plan) if settings.plan else None
    log_recipe(recipe)
    reports = apply_recipe(job, recipe.steps, log_step)
    require_quantized(job.model)
    proof = prove_and_log(job, detector, evaluation_set, settings, reports, recipe.name)
    if settings.require_gpu:
        proof.speed.placement.require_gpu()


if __name__ == "__main__":
    run_entry_point("ptq", PtqSettings, ptq)
