from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import cv2
import numpy as np
import pytest
import torch
from awake import wake
from torch import nn

from quantrack.datasets.demo import demo_folder
from quantrack.datasets.training import load_training_pictures
from quantrack.detector.load import load_auxiliary_head, load_detector
from quantrack.detector.student import Student
from quantrack.detector.training import Epoch, FineTuning, TrainingJob, TrainingSettings, train
from quantrack.detector.yolo_labels import write_yolo_data
from quantrack.errors import NotFiniteError, QuantrackError


def scores(*values: float) -> Callable[[nn.Module], float]:
    """A validation that gives these, one after the other."""
    following: Iterator[float] = iter(values)
    return lambda network: next(following)


def scores_then(error: BaseException, *values: float) -> Callable[[nn.Module], float]:
    """A validation that gives these, and then fails."""
    following: Iterator[float] = iter(values)

    def validate(network: nn.Module) -> float:
        score = next(following, None)
        if score is None:
            raise error
        return score

    return validate


def groups(student: Student) -> list[dict[str, object]]:
    return [{"params": list(student.network.parameters()), "lr": 1e-5, "param_group": "weights"}]


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    """Four pictures' worth of steps of the float demo detector, at 64 px."""
    pictures = load_training_pictures(demo_folder(), 8, 0, ())
    network = load_detector("demo", "one2one", 64, 0, trust_checkpoint=False).model
    student = Student(network, load_auxiliary_head("demo", 0, trust_checkpoint=False), None, mixed_precision=False)
    settings = TrainingSettings(epochs=4, batch=4, imgsz=64, patience=0, seed=0)
    data = write_yolo_data(pictures, tmp_path)
    return TrainingJob(student, groups, scores(), lambda epoch: None, settings, data, tmp_path, torch.device("cpu"))


def test_the_best_epoch_is_kept(job: TrainingJob) -> None:
    seen: list[Epoch] = []
    trained = train(replace(job, validate=scores(0.5, 0.4, 0.6, 0.5, 0.55), on_epoch=seen.append))
    assert (trained.best_epoch, trained.best_score, trained.epochs, trained.stopped) == (2, 0.6, 4, "")
    assert [epoch.number for epoch in seen] == [0, 1, 2, 3, 4]
    assert {"box_loss", "cls_loss", "dfl_loss", "one2many_loss", "total_loss"} == seen[1].losses.keys()
    losses = seen[1].losses
    one2one = losses["box_loss"] + losses["cls_loss"] + losses["dfl_loss"]
    assert losses["total_loss"] == pytest.approx(0.9 * one2one + losses["one2many_loss"], rel=1e-4)
    assert seen[4].rates["weights"] < seen[1].rates["weights"]
    kept = torch.load(job.best, weights_only=True)["ema"]
    assert all(torch.equal(value, kept[name]) for name, value in job.student.state_dict().items())


def test_a_finished_training_is_not_done_again(job: TrainingJob) -> None:
    trained = train(replace(job, validate=scores(0.5, 0.4, 0.6, 0.5, 0.55)))
    assert train(job) == trained  # there is no score left to be asked for


def test_both_heads_reach_the_backbone_and_learn(job: TrainingJob) -> None:
    before = [parameter.clone() for parameter in job.student.auxiliary_parameters]
    first = next(job.student.network.parameters()).clone()
    train(replace(job, validate=scores(0.1, 0.2, 0.3, 0.4, 0.5)))
    assert not torch.equal(first, next(job.student.network.parameters()))
    assert before
    moved = zip(before, job.student.auxiliary_parameters, strict=True)
    assert any(not torch.equal(old, new) for old, new in moved)


def test_the_heads_weigh_as_at_the_end_of_a_detectors_training(job: TrainingJob) -> None:
    job.student.args = SimpleNamespace(epochs=10, box=7.5, cls=0.5, dfl=1.5)
    loss = job.student.new_criterion()
    assert (loss.one2many_share, loss.one2one_share) == (pytest.approx(0.1), pytest.approx(0.9))
    assert not hasattr(loss, "update")  # by which the trainer would move them


@pytest.mark.parametrize(("source", "head"), [("demo", "one2many"), ("demo", "one2one"), ("yolov8n.yaml", "one2many")])
def test_each_kind_of_head_learns_alone(source: str, head: str) -> None:
    """A detector with one head, and one that has lost its one-to-many head."""
    network = load_detector(source, head, 64, 0, trust_checkpoint=False).model
    if source != "demo":
        wake(network, 64)
    student = Student(network, None, None, mixed_precision=False).requires_grad_(True).train()
    student.args = SimpleNamespace(epochs=10, box=7.5, cls=0.5, dfl=1.5, cls_pw=0.0, overlap_mask=True)
    box = {"cls": torch.zeros(2, 1), "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]] * 2), "batch_idx": torch.arange(2.0)}
    loss, parts = student({"img": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), **box})
    loss.backward()
    assert all(torch.isfinite(part).all() for part in parts.values())
    assert parts["box_loss"] > 0
    gradient = next(student.network.parameters()).grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-4


def test_memory_that_runs_out_does_not_change_the_batch(job: TrainingJob) -> None:
    def runs_out(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    job.student.further_loss = runs_out
    with pytest.raises(QuantrackError, match="batch=4: memory ran out in training; give a smaller batch"):
        train(replace(job, validate=scores(0.5, 0.4)))


def test_only_what_is_learned_counts_in_the_clipped_norm(job: TrainingJob) -> None:
    job.student.requires_grad_(True)
    first, *others = job.student.parameters()
    kind = type("OfOneJob", (FineTuning,), {"job": replace(job, groups=lambda student: [{"params": [first]}])})
    kind.build_optimizer(object.__new__(kind), job.student)
    assert first.requires_grad
    assert not any(parameter.requires_grad for parameter in others)


def test_what_another_version_has_trained_is_refused(job: TrainingJob) -> None:
    units, own = {"units": torch.zeros(1)}, job.student.state_dict()
    for kept in ({"student": units, "best_trained": (0.5, 1)}, {"student": own}):
        torch.save({**kept, "finished": False}, job.last)
        with pytest.raises(QuantrackError, match=r"last.pt: was trained by another version of Quantrack"):
            train(job)


def test_collapse_ends_the_training_and_keeps_the_best(job: TrainingJob) -> None:
    trained = train(replace(job, validate=scores(0.5, 0.6, 0.1, 0.05)))
    assert (trained.best_epoch, trained.epochs) == (1, 2)
    assert trained.stopped == "validation fell to 0.0500 from 0.6000 of epoch 1; lower lr0"


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_best(job: TrainingJob) -> None:
    def broken(student: Student) -> list[dict[str, object]]:
        return [{"params": list(student.network.parameters()), "lr": 1e30, "param_group": "weights"}]

    trained = train(replace(job, validate=scores(0.5, 0.6, 0.6, 0.6, 0.6), groups=broken))
    assert "is not finite; lower lr0" in trained.stopped
    assert all(value.isfinite().all() for value in job.student.state_dict().values())


def test_patience(job: TrainingJob) -> None:
    patient = replace(job, settings=replace(job.settings, patience=1))
    trained = train(replace(patient, validate=scores(0.5, 0.6, 0.55)))
    assert trained.stopped == "no better epoch after epoch 1 for 1 epochs"


def test_patience_counts_from_the_best_trained_epoch_also_after_a_kill(job: TrainingJob) -> None:
    """The start is better than all of them, as it may be after a good calibration."""
    patient = replace(job, settings=replace(job.settings, patience=2))
    start = {name: value.clone() for name, value in job.student.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        train(replace(patient, validate=scores_then(KeyboardInterrupt(), 0.5, 0.3, 0.31)))
    assert torch.load(job.last, weights_only=True)["epoch"] == 2
    job.student.load_state_dict(start)
    trained = train(replace(patient, validate=scores(0.32, 0.33)))
    assert (trained.best_epoch, trained.epochs, trained.stopped) == (0, 4, "")


def test_weights_that_the_last_step_broke_end_the_training(job: TrainingJob) -> None:
    trained = train(replace(job, validate=scores_then(NotFiniteError("picture 7: NaN"), 0.5, 0.6)))
    assert (trained.best_epoch, trained.best_score, trained.epochs) == (1, 0.6, 1)
    assert trained.stopped == "what the detector gives after epoch 2 is not finite; lower lr0"


def test_training_takes_the_threads_that_there_are(job: TrainingJob) -> None:
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        short = replace(job, settings=replace(job.settings, epochs=1))
        train(replace(short, validate=lambda network: seen.append(torch.get_num_threads()) or 0.5))
        assert set(seen) == {3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_picture_that_ultralytics_would_leave_out_is_named(job: TrainingJob) -> None:
    picture = sorted((job.folder / "images/train").iterdir())[1]
    picture.unlink()
    cv2.imwrite(str(picture), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(QuantrackError, match=rf"1 of 7 pictures cannot be trained on, {picture.name} first"):
        train(job)


def test_failures_of_the_trainer_are_one_line(job: TrainingJob) -> None:
    with pytest.raises(QuantrackError, match="training failed"):
        train(replace(job, data=job.folder / "missing.yaml"))


def test_the_job_travels_to_the_processes_of_ddp(job: TrainingJob) -> None:
    kind = type("FineTuningOfOneJob", (FineTuning,), {"job": replace(job, validate=len, on_epoch=print)})
    there = cloudpickle.loads(cloudpickle.dumps(kind))
    assert issubclass(there, FineTuning)
    sent, received = job.student.state_dict(), there.job.student.state_dict()
    assert all(torch.equal(value, received[name]) for name, value in sent.items())
