"""Quantization-aware training: start from a PTQ run, train, and prove the result as `ptq` does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from ptq import ptq

from quantrack.datasets.calibration import CalibrationSet, load_calibration_set
from quantrack.datasets.coco import EvaluationSet, load_evaluation_set
from quantrack.datasets.training import load_training_pictures
from quantrack.detector.device import resolve_device
from quantrack.detector.load import Detector, load_auxiliary_head, load_detector
from quantrack.detector.training import TrainingJob, TrainingSettings, train
from quantrack.detector.yolo_labels import write_yolo_data
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import require_same_classes, score_model
from quantrack.quantization.channel_equalization import require_scales_of_tensors
from quantrack.quantization.job import new_job
from quantrack.quantization.qat import (
    Qat,
    leave_dfl_float,
    new_student,
    require_activations_for,
    suit_integer_kernels,
    take_over_student,
)
from quantrack.quantization.state import read_quantized
from quantrack.runtime.session import require_cuda
from quantrack.runtime.variants import FULL
from quantrack.schemes import one_scale_for, parse_mode
from quantrack.settings import QatSettings, parse_settings
from quantrack.tracking.children import Children
from quantrack.tracking.log import log_inputs, log_settings, log_step
from quantrack.tracking.quantized import prove_and_log
from quantrack.tracking.record import run_digest
from quantrack.tracking.run import resumed_run
from quantrack.tracking.training import (
    Start,
    log_gain,
    log_training,
    log_training_inputs,
    new_epoch_log,
    new_training_folder,
    read_start,
    recorded_settings,
    recorded_start,
    run_to_resume,
    start_state,
    training_folder,
)


def qat(settings: QatSettings) -> None:
    """Train a quantized detector on labelled pictures, export it as QCDQ ONNX, and prove it as `ptq` does."""
    if not settings.resume:
        return train_and_prove(settings, new_training_folder())
    run = run_to_resume(settings)
    with training_folder(run.info.run_id) as folder, resumed_run(run):  # ours before anything is changed of the run
        train_and_prove(parse_settings(QatSettings, recorded_settings(run)), nullcontext(folder))


def train_and_prove(settings: QatSettings, own_folder: AbstractContextManager[Path]) -> None:
    """The whole work within the active run; what an earlier process of the run has done is not done again."""
    scheme, device = parse_mode(settings.mode), resolve_device(settings.device)
    if settings.require_gpu:
        require_cuda()
    evaluation_set = load_evaluation_set(settings.data_folder, settings.eval_images)
    calibration = load_calibration_set(
        settings.calibration_list, settings.calib_images, settings.data_folder, settings.seed
    )
    detector = load_detector(settings.model, settings.head, settings.imgsz, settings.seed, settings.trust_checkpoint)
    require_same_classes(detector.class_names, evaluation_set, f"model={settings.model}")
    pictures = load_training_pictures(
        settings.data_folder, settings.train_images, settings.seed, not_held_back=calibration.paths
    )
    log_settings(settings, f"qat-{settings.kind}-{detector.name}", {"device": str(device)})
    log_inputs(evaluation_set, calibration)
    log_training_inputs(pictures)

    with own_folder as folder:
        start = starting_run(settings, detector, evaluation_set, calibration)
        job = new_job(detector, scheme, calibration, settings.imgsz, device, settings.seed)
        job.model = read_quantized(start_state(start, settings, detector, calibration, folder), job.float_model)
        if wanting := one_scale_for(settings.variant_values()):
            require_scales_of_tensors(job.model, wanting)
        require_activations_for(job.model, settings.variant_values())
        leave_dfl_float(job)
        quantization = Qat(settings.lr0, settings.lr0_scales, settings.distill_weight, settings.amp)
        auxiliary = None
        if settings.head == "one2one":
            auxiliary = load_auxiliary_head(settings.model, settings.seed, settings.trust_checkpoint)
        student = new_student(job, quantization, auxiliary)
        validate = partial(score_model, evaluation_set=pictures.held_back, head=settings.head, imgsz=settings.imgsz)
        training = TrainingSettings(settings.epochs, settings.batch, settings.imgsz, settings.patience, settings.seed)
        data = write_yolo_data(pictures, folder)
        work = TrainingJob(student, quantization.groups, validate, new_epoch_log(), training, data, folder, device)
        log_training(train(work), work.best)

        take_over_student(job, student)
        reports = (suit_integer_kernels(job),) if settings.placement == FULL else ()
        for place, report in enumerate(reports, 1):
            log_step(place, report)
        recipe = f"{start.recipe}-qat"
        proof = prove_and_log(job, detector, evaluation_set, settings, reports, recipe, "qat")
        log_gain(start, proof, evaluation_set)


def starting_run(
    settings: QatSettings, detector: Detector, evaluation_set: EvaluationSet, calibration: CalibrationSet
) -> Start:
    """The PTQ run that an earlier process of this run took, else the one given, else one of the same settings.

    That is found finished, or made in a nested run.
    """
    if start := recorded_start():
        return start
    if settings.from_run:
        return read_start(settings.from_run)
    children = Children()
    digest = run_digest(settings.ptq, detector, evaluation_set, calibration)
    children.find_or_run("ptq", "ptq", settings.ptq, digest, partial(ptq, settings.ptq))
    return read_start(children.run_ids[0])


if __name__ == "__main__":
    run_entry_point("qat", QatSettings, qat)
