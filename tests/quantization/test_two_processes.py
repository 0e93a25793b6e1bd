"""DDP, as far as it goes without GPUs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import SMALL
from two_cpus import OnTwoCpus, note

from quantrack.datasets.calibration import load_calibration_set
from quantrack.datasets.demo import demo_folder
from quantrack.datasets.training import load_training_pictures
from quantrack.detector import training
from quantrack.detector.load import load_auxiliary_head, load_detector
from quantrack.detector.student import Student
from quantrack.detector.training import TrainingJob, TrainingSettings, train
from quantrack.detector.yolo_labels import write_yolo_data
from quantrack.evaluation.measure import score_model
from quantrack.quantization.job import new_job
from quantrack.quantization.qat import Qat, leave_dfl_float, new_student
from quantrack.quantization.recipe import RECIPES
from quantrack.schemes import parse_mode

SIZE = 64


def quantized_student(settings: Qat) -> Student:
    """The small detector at W4A8, as `naive` leaves it, with its other head and a teacher."""
    detector = load_detector(SMALL, "one2one", SIZE, 0, trust_checkpoint=False)
    calibration = load_calibration_set("random", 4, demo_folder(), seed=0)
    job = new_job(detector, parse_mode("w4a8"), calibration, SIZE, torch.device("cpu"), seed=0)
    for step in RECIPES["naive"]:
        step.apply(job)
    leave_dfl_float(job)
    return new_student(job, settings, load_auxiliary_head(SMALL, 0, trust_checkpoint=False))


def seen_by(rank: int, folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def test_two_processes_train_one_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer starts them, sends them the job, and each sees other pictures of a step."""
    monkeypatch.setattr(training, "FineTuning", OnTwoCpus)
    pictures = load_training_pictures(demo_folder(), 16, 0, ())
    settings = Qat(lr0=0.001, lr0_scales=0.0003, distill_weight=1.0)
    student = quantized_student(settings)
    start = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    validate = partial(score_model, evaluation_set=pictures.held_back, head="one2one", imgsz=SIZE)
    steps = TrainingSettings(epochs=2, batch=4, imgsz=SIZE, patience=0, seed=0)
    data = write_yolo_data(pictures, tmp_path)
    job = TrainingJob(
        student, settings.groups, validate, partial(note, tmp_path), steps, data, tmp_path, torch.device("cpu")
    )
    trained = train(job)

    first, second = seen_by(0, tmp_path), seen_by(1, tmp_path)
    assert len(first) == len(second) == 2 * 4  # 14 pictures, two at a time in each process
    assert [step["learned"] for step in first] == [step["learned"] for step in second]
    assert len({step["learned"] for step in first}) == len(first)
    for epoch in (slice(0, 4), slice(4, 8)):
        one, other = ({name for step in seen[epoch] for name in step["pictures"]} for seen in (first, second))
        assert len(one) == len(other) == 7
        assert not one & other
    assert (tmp_path / "epochs").read_text().split() == ["0", "1", "2"]  # one process validates and logs
    assert (trained.epochs, trained.stopped) == (2, "")
    learned = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    assert torch.equal(start, learned) is (trained.best_epoch == 0)
