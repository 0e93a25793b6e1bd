"""Log a training epoch by epoch, and find what an interrupted one needs to go on."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import mlflow
from mlflow.entities import Run

from quantrack.cache import cache_folder, cache_lasts, writable_folder
from quantrack.comparison.runs import ACCURACY
from quantrack.datasets.calibration import CalibrationSet
from quantrack.datasets.coco import EvaluationSet
from quantrack.datasets.training import TrainingPictures
from quantrack.detector.load import Detector
from quantrack.detector.training import LAST, Epoch, Trained
from quantrack.errors import QuantrackError, UsageError
from quantrack.evaluation.bootstrap import paired_drop_interval
from quantrack.evaluation.coco_metrics import detections_from_json, drop_points
from quantrack.evaluation.measure import Proof
from quantrack.evaluation.plots import training_figure
from quantrack.progress import say
from quantrack.quantization.recipe import parse_recipe
from quantrack.settings import QatSettings, setting_name
from quantrack.tracking.log import log_dataset
from quantrack.tracking.models import fetch
from quantrack.tracking.quantized import QUANTIZED_STATE
from quantrack.tracking.read import active_run_id, current_run, read_json, require_run

VALIDATION = f"validation/{ACCURACY}"
START_TAG = "ptq_run_id"
TRAININGS = "training"  # within the cache
TRAINED = re.compile("(-qat)+$")  # what trainings add to the name of a start's recipe


@dataclass(frozen=True)
class Start:
    """The finished PTQ run that a training starts from."""

    run_id: str
    status: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def recipe(self) -> str:
        """How it was quantized."""
        return self.tags["recipe"]


def read_start(run_id: str) -> Start:
    """The run of an id.

    Raises:
        QuantrackError: there is no such run.
    """
    run = require_run(run_id, "from_run")
    return Start(run.info.run_id, run.info.status, run.data.tags, run.data.metrics)


def recorded_start() -> Start | None:
    """The start that an earlier process of the active run has chosen already, if any."""
    run_id = current_run().data.tags.get(START_TAG)
    return read_start(run_id) if run_id else None


@contextmanager
def training_folder(run_id: str) -> Iterator[Path]:
    """The folder of a run's training, on this machine, for one process at a time; removed once all is done.

    Raises:
        QuantrackError: another process is using it, or it cannot be made.
    """
    folder = writable_folder(TRAININGS, run_id)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise QuantrackError(f"run {run_id}: another process is training it; wait for it to end") from error
        try:
            yield folder
        except QuantrackError:
            if not (folder / LAST).is_file():  # nothing to go on with
                shutil.rmtree(folder, ignore_errors=True)
            raise
        gone = folder.with_name(f".{folder.name}.gone")  # under its name another process may lock a new one meanwhile
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def say_how_to_go_on(folder: Path) -> None:
    """Tell the user where the active run trains, and what to do after an interruption."""
    hint = f"; if it is interrupted, go on with: -e qat -P resume={active_run_id()}" if cache_lasts() else ""
    say(f"training in {folder}{hint}")


def _folder_of(run_id: str) -> Path:
    return cache_folder() / TRAININGS / run_id


def require_training_folder(run: Run) -> None:
    """Check that a run's training can be gone on with here.

    Raises:
        QuantrackError: it is no qat run, has finished, or its folder is not on this machine.
    """
    if run.data.tags.get("entry_point") != "qat":
        raise QuantrackError(f"resume={run.info.run_id}: not a qat run; give the id of an interrupted qat run")
    if run.info.status == "FINISHED":
        raise QuantrackError(f"resume={run.info.run_id}: the run has finished; there is nothing to go on with")
    folder = _folder_of(run.info.run_id)
    if not folder.is_dir():
        raise QuantrackError(f"resume={run.info.run_id}: {folder} is not on this machine; start a new qat run")


def log_training_inputs(pictures: TrainingPictures) -> None:
    """The pictures trained on and those held back, as inputs.

    Raises:
        QuantrackError: the run that is gone on with trained on others.
    """
    known = current_run().data.tags
    for part, context in ((pictures.training, "training"), (pictures.held_back, "validation")):
        tag = f"{context}_digest"
        if known.get(tag, part.digest) != part.digest:
            raise QuantrackError(
                f"{part.root}: its {context} pictures have changed since the run began; start a new one"
            )
        log_dataset(part.root, part.name, part.digest, context)
        mlflow.set_tag(tag, part.digest)


def start_state(
    start: Start, settings: QatSettings, detector: Detector, calibration: CalibrationSet, folder: Path
) -> Path:
    """The quantized state of the PTQ run to start from, which becomes the active run's start.

    Raises:
        UsageError: the run is of another mode, detector, head or input size, of other calibration pictures, or not by
            the recipe that was given.
        QuantrackError: it is no finished PTQ run, or has logged no state.
    """
    run_id, tags = start.run_id, start.tags
    if tags.get("entry_point") not in ("ptq", "qat") or start.status != "FINISHED":
        raise QuantrackError(f"from_run={run_id}: not a finished ptq run; give one, or leave it out")
    wanted = {"mode": settings.scheme_name, "model_digest": detector.digest}
    wanted |= {"head": settings.head, "imgsz": str(settings.imgsz)}
    for name, value in wanted.items():
        if tags.get(name) != value:
            raise UsageError(f"from_run={run_id}: its {name} is {tags.get(name)}, not {value}; give a run of the same")
    if tags.get("calibration_digest") != calibration.digest:
        raise UsageError(
            f"from_run={run_id}: was calibrated on other pictures than these {len(calibration.paths)}; give "
            "calib_list, calib_images and, with calib_list=random, seed as that run has them"
        )
    given = parse_recipe(settings.recipe).name
    if settings.recipe != QatSettings.recipe and given != TRAINED.sub("", start.recipe):
        raise UsageError(f"from_run={run_id}: was made by recipe {start.recipe}, not {given}; leave recipe out")
    mlflow.set_tag(START_TAG, run_id)
    return fetch(f"runs:/{run_id}/{QUANTIZED_STATE}", "from_run", folder)


@dataclass(frozen=True)
class EpochLog:
    """Logs epochs to a run by its id, so that a process that DDP starts can do it as well."""

    run_id: str
    tracking_uri: str

    def __call__(self, epoch: Epoch) -> None:
        mlflow.set_tracking_uri(self.tracking_uri)
        metrics = {f"train/{name}": value for name, value in epoch.losses.items()}
        metrics |= {f"lr/{name}": value for name, value in epoch.rates.items()}
        metrics |= {VALIDATION: epoch.score, "ema/updates": float(epoch.ema_updates), "ema/decay": epoch.ema_decay}
        metrics["train/epoch_seconds"] = epoch.seconds
        mlflow.log_metrics(metrics, step=epoch.number, run_id=self.run_id)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in epoch.losses.items())
        where = f"epoch {epoch.number}" if epoch.number else "start"
        best = f"validation {ACCURACY} {epoch.score:.4f}, best {epoch.best_score:.4f}"
        say(f"{where}: {losses + ', ' if losses else ''}{best}, {epoch.seconds:.0f} s")


def new_epoch_log() -> EpochLog:
    """For the active run."""
    return EpochLog(active_run_id(), mlflow.get_tracking_uri())


def log_training(trained: Trained, best: Path) -> None:
    """The curves, the best checkpoint (the EMA's state), and how the training ended."""
    run, client = current_run(), mlflow.MlflowClient()
    run_id = run.info.run_id
    names = [name for name in run.data.metrics if name.startswith("train/") and "seconds" not in name]
    history = {
        name.removeprefix("train/"): [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        for name in sorted(names)
    }
    history[VALIDATION] = [(point.step, point.value) for point in client.get_metric_history(run_id, VALIDATION)]
    mlflow.log_figure(training_figure(history, VALIDATION), "plots/training.png")
    mlflow.log_artifact(str(best), "training")
    mlflow.log_metrics({"best_epoch": float(trained.best_epoch), "best_validation": trained.best_score})
    mlflow.set_tag("training_ended", trained.stopped or f"all {trained.epochs} epochs")
    say(f"training: best is epoch {trained.best_epoch}" + (f"; stopped: {trained.stopped}" if trained.stopped else ""))


def log_gain(start: Start, proof: Proof, evaluation_set: EvaluationSet) -> None:
    """What training gained over the PTQ run, in points with a 95 % interval, and the share of its drop recovered.

    Absent where the PTQ run was measured on other pictures.
    """
    before = start.metrics
    if start.tags.get("evaluation_digest") != evaluation_set.digest or ACCURACY not in before:
        return
    detections = detections_from_json(read_json(start.run_id, "detections.json"))
    interval = paired_drop_interval(evaluation_set, proof.detections, detections)
    gain = drop_points(proof.coco.metrics[ACCURACY], before[ACCURACY])  # what the start lacks
    metrics = {f"{ACCURACY}_ptq": before[ACCURACY], f"{ACCURACY}_gain": gain}
    ends = interval.metrics("gain")
    metrics |= ends
    if before.get(f"{ACCURACY}_drop", 0.0) > 0:
        metrics["recovered_share"] = gain / before[f"{ACCURACY}_drop"]
    mlflow.log_metrics(metrics)
    after = f"{ACCURACY} {proof.coco.metrics[ACCURACY]:.4f}, before training {before[ACCURACY]:.4f}"
    bounds = f", 95 % interval {interval.low:.2f} to {interval.high:.2f}" if ends else ""
    say(f"qat: {after}; gain {gain:.2f} points{bounds}")


def recorded_settings(run: Run) -> dict[str, str]:
    """The settings that a run was started with, as texts."""
    known = {setting_name(item) for item in fields(QatSettings)}
    return {name: text for name, text in run.data.params.items() if name in known}


def run_to_resume(settings: QatSettings) -> Run:
    """The run that `resume` names.

    Raises:
        QuantrackError: there is no such run, or it cannot be gone on with here.
        UsageError: other settings were given than those of the run.
    """
    run = require_run(settings.resume, "resume")
    require_training_folder(run)
    settings.require_only_resume(run.data.params)
    return run
