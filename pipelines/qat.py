"""Quantization-aware training: start from a PTQ run, train, and prove the result as `ptq` does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ptq import ptq
from torch import nn

import quantrack.program  # noqa: F401
from quantrack.datasets.calibration import CalibrationSet, load_calibration_set
from quantrack.datasets.coco import EvaluationSet, load_evaluation_set, require_same_categories
from quantrack.datasets.training import TrainingPictures, load_training_pictures
from quantrack.detector.device import resolve_device
from quantrack.detector.load import Detector, load_auxiliary_head, load_detector
from quantrack.detector.training import TrainingJob, TrainingSettings, train
from quantrack.detector.yolo_labels import write_yolo_data
from quantrack.entry import run_entry_point
from quantrack.evaluation.measure import require_same_classes, score_model
from quantrack.quantization.job import StepReport, new_job
from quantrack.quantization.qat import (
    Qat,
    leave_dfl_float,
    new_student,
    refit_pair_sums,
    require_suits_variant,
    take_over_student,
)
from quantrack.quantization.state import read_quantized
from quantrack.runtime.session import require_cuda
from quantrack.runtime.variants import FULL
from quantrack.schemes import ONE2ONE, parse_mode
from quantrack.settings import QatSettings, parse_settings
from quantrack.tracking.children import find_or_run
from quantrack.tracking.log import log_inputs, log_settings, log_step
from quantrack.tracking.quantized import prove_and_log
from quantrack.tracking.read import active_run_id
from quantrack.tracking.run import name_run, resumed_run
from quantrack.tracking.run_digest import run_digest
from quantrack.tracking.training import (
    Start,
    log_gain,
    log_training,
    log_training_inputs,
    new_epoch_log,
    read_start,
    recorded_settings,
    recorded_start,
    run_to_resume,
    say_how_to_go_on,
    start_state,
    training_folder,
)


@dataclass(frozen=True)
class Inputs:
    """What a training reads: pictures to score, to calibrate and to learn on, and the float detector."""

    evaluation_set: EvaluationSet
    calibration: CalibrationSet
    pictures: TrainingPictures
    detector: Detector


def qat(settings: QatSettings) -> None:
    """Train a quantized detector on labelled pictures, export it as QCDQ ONNX, and prove it as `ptq` does."""
    if settings.resume:
        run = run_to_resume(settings)
        name_run(f"resume-{run.info.run_name}")
        with training_folder(run.info.run_id) as folder, resumed_run(run):  # ours before the run is changed
            settings = parse_settings(QatSettings, recorded_settings(run))
            train_and_prove(settings, read_inputs(settings), folder)
    else:
        inputs = read_inputs(settings)
        with training_folder(active_run_id()) as folder:
            train_and_prove(settings, inputs, folder)


def read_inputs(settings: QatSettings) -> Inputs:
    """The pictures and the detector, which must have the same classes."""
    resolve_device(settings.device)  # refuses one that is not there before anything is read
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
    require_same_categories(pictures.training, evaluation_set)
    return Inputs(evaluation_set, calibration, pictures, detector)


def train_and_prove(settings: QatSettings, inputs: Inputs, folder: Path) -> None:
    """The whole work within the active run; what an earlier process of the run has done is not done again."""
    detector, evaluation_set, device = inputs.detector, inputs.evaluation_set, resolve_device(settings.device)
    log_settings(settings, f"qat-{settings.mode_and_variant}-{detector.name}", {"device": str(device)})
    log_inputs(evaluation_set, inputs.calibration)
    log_training_inputs(inputs.pictures)

    start = starting_run(settings, inputs)
    job = new_job(detector, parse_mode(settings.mode), inputs.calibration, settings.imgsz, device, settings.seed)
    job.model = read_quantized(start_state(start, settings, detector, inputs.calibration, folder), job.float_model)
    require_suits_variant(job.model, settings.variant)
    leave_dfl_float(job)

    quantization = Qat(settings.lr0, settings.lr0_scales, settings.distill_weight, settings.amp)
    student = new_student(job, quantization, auxiliary_head(settings))
    held_back = inputs.pictures.held_back
    validate = partial(score_model, evaluation_set=held_back, head=settings.head, imgsz=settings.imgsz)
    training = TrainingSettings(settings.epochs, settings.batch, settings.imgsz, settings.patience, settings.seed)
    data = write_yolo_data(inputs.pictures, folder)
    work = TrainingJob(student, quantization.groups, validate, new_epoch_log(), training, data, folder, device)
    say_how_to_go_on(folder)
    log_training(train(work), work.best)
    take_over_student(job, student)

    reports: list[StepReport] = []
    if settings.placement == FULL:
        reports.append(refit_pair_sums(job))
        log_step(1, reports[0])
    proof = prove_and_log(job, detector, evaluation_set, settings, reports, f"{start.recipe}-qat")
    log_gain(start, proof, evaluation_set)
    if settings.require_gpu:
        proof.speed.placement.require_gpu()


def auxiliary_head(settings: QatSettings) -> tuple[nn.Module, nn.Module] | None:
    """The one-to-many head, from which a one-to-one detector learns as well."""
    if settings.head != ONE2ONE:
        return None
    return load_auxiliary_head(settings.model, settings.seed, settings.trust_checkpoint)


def starting_run(settings: QatSettings, inputs: Inputs) -> Start:
    """The PTQ run that an earlier process of this run took, else the one given, else one of the same settings.

    That is found finished, or made in a nested run.
    """
    if start := recorded_start():
        return start
    if settings.from_run:
        return read_start(settings.from_run)
    digest = run_digest(settings.ptq, inputs.detector, inputs.evaluation_set, inputs.calibration)
    return read_start(find_or_run("ptq", "ptq", settings.ptq, digest, partial(ptq, settings.ptq)))


if __name__ == "__main__":
    run_entry_point("qat", QatSettings, qat)
