"""Post-training quantization, proved: calibrate, quantize, export QCDQ ONNX, run, score, log."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from quantrack.datasets.calibration import load_calibration_set
from quantrack.datasets.coco import load_evaluation_set
from quantrack.detector.device import resolve_device
from quantrack.detector.load import load_detector
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import prove, require_same_classes
from quantrack.onnx.files import export_quantized_files
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.job import StepReport, new_job
from quantrack.quantization.recipe import parse_recipe, recipe_for
from quantrack.quantization.sensitivity import LayerTrials, plan_job
from quantrack.runtime.session import open_session, require_cuda
from quantrack.runtime.variants import make_variant, reference_for
from quantrack.schemes import parse_mode
from quantrack.settings import PtqSettings, parse_plan_bits, shared_texts
from quantrack.tracking.baseline import FLOAT_RECIPE, find_or_measure_baseline
from quantrack.tracking.log import log_inputs, log_quantization, log_recipe, log_samples, log_settings, log_step
from quantrack.tracking.models import fetch_plan
from quantrack.tracking.record import log_run_digest
from quantrack.tracking.result import comparison_key, detector_facts, log_result


def ptq(settings: PtqSettings) -> None:
    """Quantize a detector to low bits, export it as QCDQ ONNX, and prove it in ONNX Runtime on COCO."""
    scheme, recipe = parse_mode(settings.mode), recipe_for(settings.target, parse_recipe(settings.recipe))
    device = resolve_device(settings.device)
    if settings.require_gpu:
        require_cuda()
    evaluation_set = load_evaluation_set(settings.data_folder, settings.eval_images)
    calibration = load_calibration_set(
        settings.calibration_list, settings.calib_images, settings.data_folder, settings.seed
    )
    detector = load_detector(settings.model, settings.head, settings.imgsz, settings.seed, settings.trust_checkpoint)
    require_same_classes(len(detector.class_names), evaluation_set, settings.model)
    log_settings(settings, f"ptq-{settings.kind}-{recipe.name}-{detector.name}", {"device": str(device)})
    log_inputs(evaluation_set, calibration)
    log_run_digest(settings, detector, evaluation_set, calibration)

    job = new_job(detector, scheme, calibration, settings.imgsz, device, settings.seed)
    reports: tuple[StepReport, ...] = ()
    if settings.plan:
        job.plan = fetch_plan(settings.plan)
    elif settings.avg_bits:
        reports = (plan_job(job, LayerTrials(bits=parse_plan_bits(settings.plan_bits)), settings.avg_bits),)
        log_step(0, reports[0])
    log_recipe(recipe)
    reports += apply_recipe(job, recipe.steps, log_step)
    quantized = log_quantization(job, reports)

    facts = replace(
        detector_facts(detector, evaluation_set, settings.imgsz, scheme.name, recipe.name),
        weight_bits_avg=quantized["weight_bits_avg"],
        placement=settings.placement,
        weight_storage=settings.weight_storage,
        precision=settings.precision,
        target=settings.target,
    )
    with tempfile.TemporaryDirectory() as folder:
        exported = export_quantized_files(job.model, facts, Path(folder))
        files = make_variant(exported, facts, calibration, settings.provider)
        session = open_session(files.optimized, settings.provider)
        key = comparison_key(facts, evaluation_set, session.provider)
        float_facts = detector_facts(detector, evaluation_set, settings.imgsz, "fp32", FLOAT_RECIPE)
        baseline = find_or_measure_baseline(
            detector, float_facts, evaluation_set, key, shared_texts(settings), settings.latency_runs
        )
        reference = reference_for(files, facts, job.model, settings.provider)
        beside = baseline.open(settings.provider, Path(folder) / "float32")
        proof = prove(session, evaluation_set, settings.head, settings.latency_runs, reference, beside)
        log_result(files, facts, proof, evaluation_set, quantized | baseline.drop(proof, evaluation_set))
    log_samples(evaluation_set, baseline.detections, proof.detections)
    if settings.require_gpu:
        proof.speed.placement.require_gpu()


if __name__ == "__main__":
    run_entry_point("ptq", PtqSettings, ptq)
