"""Training with Ultralytics' trainer: its augmentation, data loader, EMA, schedule and DDP.

What is ours: the network and its loss (`Student`), the optimizer's groups, validation, and checkpoints
that a killed training goes on from exactly. Ultralytics' own loggers stay out.
"""

from __future__ import annotations

import math
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from quantrack.cache import variable_kept
from quantrack.detector.student import Student
from quantrack.detector.ultralytics_setup import prepare
from quantrack.errors import NotFiniteError, QuantrackError
from quantrack.files import atomic_path
from quantrack.progress import new_bar, say

prepare()
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402
from ultralytics.utils import RANK  # noqa: E402
from ultralytics.utils.torch_utils import unwrap_model  # noqa: E402

LAST = "last.pt"
COLLAPSED_SHARE = 0.5  # of the best validation score, twice in a row
WARM_UP_SHARE = 0.1
WITHOUT_MOSAIC_SHARE = 1 / 3
FINAL_RATE_SHARE = 0.01
# How far apart seeds and DDP's ranks are, so that no epoch draws what one of another seed or rank draws.
SEED_STRIDE, RANK_STRIDE = 100_003, 10_000_019


@dataclass(frozen=True)
class TrainingSettings:
    """How long, and on inputs of what size; `patience` in epochs without a better one."""

    epochs: int
    batch: int
    imgsz: int
    patience: int
    seed: int


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to; number 0 is the start, which was only validated."""

    number: int
    score: float
    best_score: float
    losses: Mapping[str, float]
    rates: Mapping[str, float]
    ema_updates: int
    ema_decay: float
    seconds: float


@dataclass(frozen=True)
class TrainingJob:
    """All that a training needs; DDP pickles it for its processes.

    `groups` gives the optimizer's parameter groups, each with its rate `lr` and its name `param_group`;
    `validate` scores the EMA's network, more is better; checkpoints lie in `folder`.
    """

    student: Student
    groups: Callable[[Student], list[dict[str, object]]]
    validate: Callable[[nn.Module], float]
    on_epoch: Callable[[Epoch], None]
    settings: TrainingSettings
    data: Path
    folder: Path
    device: torch.device

    @property
    def last(self) -> Path:
        """After the last whole epoch: everything to go on from."""
        return self.folder / LAST

    @property
    def best(self) -> Path:
        """The EMA of the best epoch so far."""
        return self.folder / "best.pt"


@dataclass(frozen=True)
class Trained:
    """How a training ended; the student holds the best epoch's EMA. `stopped` says why it ended early."""

    best_epoch: int
    best_score: float
    epochs: int
    stopped: str


def train(job: TrainingJob) -> Trained:
    """Train, or go on from the last whole epoch of the job's folder, and load the best epoch.

    Raises:
        QuantrackError: the trainer fails.
    """
    _require_same_student(job)
    if not _is_finished(job):
        # a class of its own, so that DDP's processes get the job with it
        kind = type("FineTuningOfOneJob", (FineTuning,), {"job": job})
        with variable_kept("CUDA_VISIBLE_DEVICES"), _threads_kept() as threads:  # Ultralytics may change both
            try:
                trainer = kind(overrides=_overrides(job))
                torch.set_num_threads(threads)
                trainer.train()
            except (RuntimeError, ValueError, TypeError, OSError, subprocess.CalledProcessError) as error:
                reason = " ".join(str(error).split())[:300]
                raise QuantrackError(f"training failed ({type(error).__name__}: {reason})") from error
    last, best = _load(job.last), _load(job.best)
    job.student.load_state_dict(best["ema"])
    job.student.eval()
    return Trained(best["epoch"], best["score"], last["epoch"], last["stopped"])


@contextmanager
def _threads_kept() -> Iterator[int]:
    """The threads that there are; Ultralytics would train on one core fewer than the machine has, and leave it so."""
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class FineTuning(DetectionTrainer):  # type: ignore[misc]  # Ultralytics is untyped
    """Ultralytics' trainer on a job; not named Trainer, as it hooks its loggers into classes that are."""

    job: TrainingJob

    def get_model(self, cfg: object = None, weights: object = None, verbose: bool = True) -> Student:
        """The student: what DDP and the EMA wrap."""
        return self.job.student

    def build_optimizer(self, model: nn.Module, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        """Adam on the job's groups; other parameters stay, whose gradients would only count in the clipped norm."""
        optimizer = torch.optim.Adam(self.job.groups(unwrap_model(model)), betas=(0.9, 0.99))
        learned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in learned)
        return optimizer

    def get_validator(self) -> SimpleNamespace:
        """Nothing: the job validates."""
        return SimpleNamespace(metrics=SimpleNamespace(keys=[]), dataloader=None)

    def resume_training(self, ckpt: object) -> None:
        """Go on from our own checkpoint, or validate the start; then training begins."""
        self.stopped, self.low_scores, self.best_epoch = "", 0, 0
        self.bar, self.began = new_bar(), time.monotonic()
        self._require_all_pictures()
        if self.job.last.is_file():
            self._go_on(_load(self.job.last))
        elif RANK in (-1, 0):
            self.best_fitness = self.job.validate(self.ema.ema.network)
            self._save(self.job.best, {"epoch": 0, "score": self.best_fitness})
            self._report(0, self.best_fitness, {}, {})

    def _require_all_pictures(self) -> None:
        """Ultralytics leaves out what it cannot use and does not say so: the run would name pictures that nobody saw.

        Raises:
            QuantrackError: it left some out.
        """
        used = {Path(path).name for path in self.train_loader.dataset.im_files}
        lacking = sorted({path.name for path in (self.job.folder / "images" / "train").iterdir()} - used)
        if lacking:
            raise QuantrackError(
                f"training: {len(lacking)} of {len(lacking) + len(used)} pictures cannot be trained on, {lacking[0]} "
                "first (unreadable, less than 10 pixels wide or high, of another file type, or its boxes are broken); "
                "take them out of the train annotations"
            )

    def _go_on(self, kept: Mapping[str, Any]) -> None:
        student = unwrap_model(self.model)
        student.load_state_dict(kept["student"])
        self.ema.ema.load_state_dict(kept["ema"])
        self.ema.updates = kept["ema_updates"]
        self.optimizer.load_state_dict(kept["optimizer"])
        self.start_epoch, self.best_fitness, self.best_epoch = kept["epoch"], kept["best_score"], kept["best_epoch"]
        self.low_scores = kept["low_scores"]
        self.stopper.best_fitness, self.stopper.best_epoch = kept["best_trained"]
        student.criterion = student.new_criterion()
        say(f"training: going on after epoch {self.start_epoch} of {self.epochs}")

    def run_callbacks(self, event: str) -> None:
        """Ultralytics' hooks, and ours."""
        super().run_callbacks(event)
        own = {"on_train_epoch_start": self._begin_epoch, "on_train_batch_end": self._end_batch, "teardown": self._end}
        if event in own:
            own[event]()

    def _begin_epoch(self) -> None:
        """Let an epoch's draws depend on its number only, so that one after a kill is as it would have been."""
        if RANK == -1 and self.batch_size != self.job.settings.batch:
            # Ultralytics halves it and does not say so; the weights have moved by then
            raise QuantrackError(f"batch={self.job.settings.batch}: memory ran out in training; give a smaller batch")
        self.began = time.monotonic()
        seed = self.args.seed * SEED_STRIDE + max(RANK, 0) * RANK_STRIDE + self.epoch + 1
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self.train_loader.generator.manual_seed(seed)
        dataset = self.train_loader.dataset
        for index in dataset.buffer:  # pictures of the epoch before, which mosaics are made of
            dataset.ims[index] = None
        dataset.buffer.clear()
        self.train_loader.reset()
        if RANK in (-1, 0):
            self.bar = new_bar()
            self.bar.add_task(f"epoch {self.epoch + 1}/{self.epochs}", total=len(self.train_loader))
            self.bar.start()

    def _end_batch(self) -> None:
        if RANK in (-1, 0):
            self.bar.advance(self.bar.task_ids[0])
        if self.world_size <= 1 and not math.isfinite(float(self.loss.detach())):
            self.stop = True  # the epoch ends here; with several processes all must end it together

    def _end(self) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()

    def validate(self) -> tuple[dict[str, float], float | None]:
        """Score the EMA; a loss that is not finite, or a score that stays low, ends the training."""
        if RANK not in (-1, 0):
            return {}, None
        self.bar.stop()
        number = self.epoch + 1
        losses = {name: float(value) for name, value in self.tloss.items()}
        if not all(math.isfinite(value) for value in losses.values()) or not math.isfinite(float(self.loss.detach())):
            return self._diverged(f"the loss of epoch {number} is not finite")
        try:
            score = self.job.validate(self.ema.ema.network)
        except NotFiniteError:  # the last step of the epoch broke the weights: no loss has seen them
            return self._diverged(f"what the detector gives after epoch {number} is not finite")
        self.low_scores = self.low_scores + 1 if score < COLLAPSED_SHARE * self.best_fitness else 0
        if self.low_scores > 1:
            best = f"{self.best_fitness:.4f} of epoch {self.best_epoch}"
            self.stopped, self.stop = f"validation fell to {score:.4f} from {best}; lower lr0", True
        if score > self.best_fitness:
            self.best_fitness, self.best_epoch = score, number
            self._save(self.job.best, {"epoch": number, "score": score})
        rates = {str(group["param_group"]): float(group["lr"]) for group in self.optimizer.param_groups}
        self._report(number, score, losses, rates)
        return {}, score

    def _diverged(self, what: str) -> tuple[dict[str, float], float | None]:
        self.stopped, self.stop = f"{what}; lower lr0", True
        return {}, 0.0

    def save_model(self) -> bool:
        """Write everything to go on from; of a broken epoch just that it ended the training."""
        if self.stopped and self.job.last.is_file():
            kept = _load(self.job.last) | {"finished": True, "stopped": self.stopped}
            with atomic_path(self.job.last) as temporary:
                torch.save(kept, temporary)
            return True
        if self.stop and not self.stopped and self.epoch + 1 < self.epochs:
            self.stopped = f"no better epoch after epoch {self.stopper.best_epoch} for {self.args.patience} epochs"
        further = {
            "epoch": self.epoch + 1,
            "student": unwrap_model(self.model).state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "best_score": self.best_fitness,
            "best_epoch": self.best_epoch,
            "best_trained": (self.stopper.best_fitness, self.stopper.best_epoch),
            "low_scores": self.low_scores,
            "finished": bool(self.stop),
            "stopped": self.stopped,
        }
        self._save(self.job.last, further)
        return True

    def _save(self, path: Path, further: Mapping[str, object]) -> None:
        with atomic_path(path) as temporary:
            torch.save({"ema": self.ema.ema.state_dict(), **further}, temporary)

    def _report(self, number: int, score: float, losses: Mapping[str, float], rates: Mapping[str, float]) -> None:
        decay = float(self.ema.decay(self.ema.updates))
        seconds = time.monotonic() - self.began
        self.job.on_epoch(Epoch(number, score, self.best_fitness, losses, rates, self.ema.updates, decay, seconds))

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Ultralytics would go back to its own checkpoint and try the same again."""
        return False

    def save_metrics(self, metrics: object) -> None:
        """The job's `on_epoch` has them."""

    def final_eval(self) -> None:
        """The best epoch is exported and evaluated as any quantized model."""


def _overrides(job: TrainingJob) -> dict[str, object]:
    """The trainer's settings; the optimizer's are the job's groups."""
    settings = job.settings
    return {
        "model": "student.yaml",  # a name only; `get_model` gives the network
        "data": str(job.data),
        "project": str(job.folder),
        "name": "ultralytics",
        "exist_ok": True,
        "epochs": settings.epochs,
        "batch": settings.batch,
        "nbs": settings.batch,  # a step of the optimizer each batch
        "imgsz": settings.imgsz,
        "patience": settings.patience,  # 0 is any number there as well
        "seed": settings.seed,
        "device": _devices(job.device),
        "amp": False,  # the student's own
        "cos_lr": True,
        "lrf": FINAL_RATE_SHARE,
        "warmup_epochs": WARM_UP_SHARE * settings.epochs,
        "warmup_bias_lr": 0.0,
        "close_mosaic": math.ceil(WITHOUT_MOSAIC_SHARE * settings.epochs),
        "plots": False,
        "verbose": False,
    }


def _devices(device: torch.device) -> str:
    """Ultralytics' name of a device; `cuda` without a number is all of them, by DDP."""
    if device.type != "cuda":
        return device.type
    if device.index is not None:
        return str(device.index)
    return ",".join(str(index) for index in range(torch.cuda.device_count()))


def _require_same_student(job: TrainingJob) -> None:
    """Check that what is gone on with is of the student that there is now.

    Raises:
        QuantrackError: another version of Quantrack has trained it.
    """
    if not job.last.is_file():
        return
    kept = _load(job.last)
    if "best_trained" not in kept or kept["student"].keys() != job.student.state_dict().keys():
        raise QuantrackError(f"{job.last}: was trained by another version of Quantrack; start a new qat run")


def _is_finished(job: TrainingJob) -> bool:
    return job.last.is_file() and bool(_load(job.last)["finished"])


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint of ours.

    Raises:
        QuantrackError: it is missing or damaged.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise QuantrackError(f"{path}: cannot be read ({type(error).__name__}); start the training again") from error
    return content
