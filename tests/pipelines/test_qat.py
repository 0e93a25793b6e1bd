"""Quantization-aware training with a small detector and on real pictures, whole and killed in the middle."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from command import ROOT, SMALL, newest_run, run_pipeline, use_store
from mlflow.entities import Run

from quantrack.tracking.read import require_run
from quantrack.tracking.training import START_TAG, recorded_start

QUICK = (
    "--model", SMALL, "--data-root", "demo", "--imgsz", "320", "--eval-images", "8", "--calib-images", "4",
    "--latency-runs", "3", "--mode", "w4a8", "--recipe", "naive", "--train-images", "16", "--batch", "4",
    "--epochs", "3", "--lr0", "0.01", "--lr0-scales", "0.001",
)  # fmt: skip
CHANGED_BY_THE_CLOCK = ("latency", "seconds", "rss", "busy", "nodes_on_", "steps_from_cache")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qat")


@pytest.fixture(scope="module")
def whole(store: Path) -> Run:
    """A training from start to end."""
    done = run_pipeline(store, "qat", *QUICK)
    assert done.returncode == 0, done.stderr
    return newest_run(store, "qat")


def lasting(run: Run) -> dict[str, float]:
    return {
        name: value
        for name, value in run.data.metrics.items()
        if not any(word in name for word in CHANGED_BY_THE_CLOCK)
    }


def test_training_recovers_what_naive_quantization_loses(store: Path, whole: Run) -> None:
    metrics = whole.data.metrics
    assert metrics["recovered_share"] > 0.4  # 80 % and more takes ten times as many pictures and epochs
    assert metrics["mAP50-95_gain_ci_low"] > 0
    assert metrics["weight_bits_avg"] == 4
    assert metrics["parity_mean_abs"] < 0.02
    assert whole.data.tags["recipe"] == "naive-qat"
    assert not {"quantize_seconds", "steps_from_cache"} & metrics.keys()  # it did no such step
    use_store(store)
    client = mlflow.MlflowClient()
    files = {entry.path for entry in client.list_artifacts(whole.info.run_id, "onnx")}
    assert "onnx/small-w4a8-qcdq-qat.onnx" in files
    assert {entry.path for entry in client.list_artifacts(whole.info.run_id, "training")} == {"training/best.pt"}
    for name in ("train/box_loss", "train/distill_loss", "lr/scales", "validation/mAP50-95", "ema/updates"):
        steps = [point.step for point in client.get_metric_history(whole.info.run_id, name)]
        assert steps == ([0, 1, 2, 3] if name.startswith(("validation", "ema")) else [1, 2, 3])


def test_a_killed_training_goes_on_as_if_nothing_had_been(store: Path, whole: Run) -> None:
    command = [sys.executable, str(ROOT / "pipelines/qat.py"), *QUICK, "--from-run", whole.data.tags["ptq_run_id"]]
    process = subprocess.Popen(command, cwd=store, env=environment(store), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 1:"):
            break
    deadline = time.monotonic() + 60
    killed = newest_run(store, "qat")
    folder = Path(os.environ["QUANTRACK_CACHE"]) / "training" / killed.info.run_id
    while not (folder / "last.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert newest_run(store, "qat").info.status == "RUNNING"
    done = run_pipeline(store, "qat", "--resume", killed.info.run_id)
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stderr
    use_store(store)
    resumed = mlflow.get_run(killed.info.run_id)
    assert resumed.info.status == "FINISHED"
    resuming = f"tags.resumed_run_id = '{killed.info.run_id}'"
    (going_on,) = mlflow.search_runs(filter_string=resuming, output_format="list")
    assert going_on.data.params == {"resume": killed.info.run_id}  # the other run's settings are not the defaults
    assert going_on.info.run_name == f"resume-{killed.info.run_name}"
    assert require_run(going_on.info.run_id, "run_id").info.run_id == killed.info.run_id  # what it came to
    assert lasting(resumed) == lasting(whole)
    assert not folder.exists()


def environment(store: Path) -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db", "PYTHONPATH": str(ROOT / "src")}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--resume", "0" * 32), 1, "no such run"),
        (("--epochs", "0"), 2, "epochs=0"),
        (("--model", "demo", "--data-root", "demo", "--train-images", "999"), 2, "train_images=999"),
        (("--train-images", "1"), 2, "train_images=1: must be at least 2"),
        (("--distill-weight", "inf"), 2, "distill_weight=inf: must be finite"),
        (("--from-run", "x", "--avg-bits", "4.5"), 2, "it has its own bits"),
    ],
)
def test_refusals(store: Path, options: tuple[str, ...], code: int, words: str) -> None:
    done = run_pipeline(store, "qat", *options)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_a_start_that_integer_kernels_cannot_take_is_not_trained(store: Path, whole: Run) -> None:
    start = whole.data.tags["ptq_run_id"]  # of the naive recipe, whose activations are symmetric
    own = [text for text in QUICK if text not in ("--recipe", "naive")]
    done = run_pipeline(store, "qat", *own, "--from-run", start, "--placement", "full")
    assert done.returncode == 2
    assert "has symmetric activations, not asymmetric; start from a run with the same placement=full" in done.stderr
    assert "epoch" not in done.stderr


def test_a_start_is_taken_with_its_own_pictures_and_recipe(store: Path, whole: Run) -> None:
    start = ("--from-run", whole.data.tags["ptq_run_id"])
    others = [text if text != "4" or at != QUICK.index("--calib-images") + 1 else "3" for at, text in enumerate(QUICK)]
    done = run_pipeline(store, "qat", *others, *start)
    assert (done.returncode, "was calibrated on other pictures than these 3" in done.stderr) == (2, True), done.stderr
    others = [text if text != "naive" else "fast" for text in QUICK]
    done = run_pipeline(store, "qat", *others, *start)
    assert (done.returncode, "was made by recipe naive, not fast" in done.stderr) == (2, True), done.stderr


def test_a_training_that_goes_on_elsewhere_is_left_alone(store: Path) -> None:
    use_store(store)
    client = mlflow.MlflowClient()
    run_id = client.create_run("0", tags={"entry_point": "qat", "failure_reason": "an earlier one"}).info.run_id
    folder = Path(os.environ["QUANTRACK_CACHE"]) / "training" / run_id
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_pipeline(store, "qat", "--resume", run_id)
    assert (done.returncode, "another process is training it" in done.stderr) == (1, True), done.stderr
    found = client.get_run(run_id)
    assert (found.info.status, found.data.tags["failure_reason"]) == ("RUNNING", "an earlier one")
    client.delete_run(run_id)


def test_a_finished_run_is_not_resumed(store: Path, whole: Run) -> None:
    done = run_pipeline(store, "qat", "--resume", whole.info.run_id)
    assert done.returncode == 1
    assert "nothing to go on with" in done.stderr


def test_a_resumed_training_keeps_the_start_it_had(store: Path, whole: Run) -> None:
    use_store(store)
    with mlflow.start_run():
        assert recorded_start() is None
        mlflow.set_tag(START_TAG, whole.data.tags["ptq_run_id"])
        start = recorded_start()
    assert start is not None
    assert (start.run_id, start.recipe) == (whole.data.tags["ptq_run_id"], "naive")


def test_a_training_is_reproduced_from_its_record(store: Path, whole: Run) -> None:
    done = run_pipeline(store, "reproduce", "--run-id", whole.info.run_id)
    assert done.returncode == 0, done.stderr
    assert "is reproduced" in done.stderr
    again = newest_run(store, "qat")
    assert again.info.run_id != whole.info.run_id
    assert again.data.tags["ptq_run_id"] == whole.data.tags["ptq_run_id"]


@pytest.mark.real
def test_real_detector(real_inputs: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (real_inputs / "coco2017").rglob("*")}
    done = run_pipeline(
        store, "qat",
        "--model", str(real_inputs / "weights/yolov10n.pt"), "--data-root", str(real_inputs / "coco2017"),
        "--calib-list", str(ROOT / "datasets/quantize-calib/quant100.txt"), "--calib-images", "8",
        "--imgsz", "320", "--eval-images", "8", "--latency-runs", "3", "--recipe", "naive",
        "--train-images", "16", "--batch", "4", "--epochs", "2", "--lr0", "0.01", "--lr0-scales", "0.001",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = newest_run(store, "qat")
    start = mlflow.get_run(run.data.tags["ptq_run_id"])
    assert start.data.metrics["mAP50-95"] < 0.1  # rounding to four bits without care loses the detector
    assert start.data.metrics["weight_bits_avg"] == 4
    # so few pictures show that all of it works on real input, not what training gains: docs/training.md has that
    validation = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation/mAP50-95")
    assert run.data.metrics["best_validation"] == max(point.value for point in validation)
    assert len(validation) == 3
    assert run.data.metrics["mAP50-95_gain_ci_low"] <= run.data.metrics["mAP50-95_gain_ci_high"]
    assert run.data.metrics["parity_mean_abs"] < 0.02
    assert before == {path: path.stat().st_mtime_ns for path in (real_inputs / "coco2017").rglob("*")}
