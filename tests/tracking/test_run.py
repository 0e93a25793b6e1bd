"""A run ends as its work ends, whatever MLflow answers, and keeps the name that its user gave it."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from quantrack.errors import QuantrackError, UsageError
from quantrack.tracking import run as runs
from quantrack.tracking.compare import _made
from quantrack.tracking.log import log_table
from quantrack.tracking.read import require_run
from quantrack.tracking.run import name_run, resumed_run, tracked_run
from quantrack.tracking.training import training_folder


@pytest.fixture(scope="module")
def run_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def own_store(run_store: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{run_store}/mlflow.db")


def refuses(*arguments: object, **settings: object) -> None:
    raise mlflow.MlflowException("the server\nis away")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (mlflow.MlflowException("the server\nis away"), "MLflow at sqlite:///.*: the server is away"),
        (
            mlflow.MlflowException("API request to https://me:a/b@host/api failed"),
            "MLflow at sqlite:///.*: API request to https://host/api failed",
        ),
        (OSError(12, "Cannot allocate memory"), "memory ran out .*smaller imgsz"),
        (PermissionError(13, "Permission denied", "/etc/shadow"), "/etc/shadow: Permission denied$"),
        (MemoryError(), "memory ran out .*smaller imgsz"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out .*Tried to allocate 2 GiB"),
        (QuantrackError("broken.jpg: empty"), "broken.jpg: empty"),
    ],
)
def test_what_ends_the_work_is_one_line_and_the_reason(error: Exception, told: str) -> None:
    with pytest.raises(QuantrackError, match=told), tracked_run("test", {}) as run:
        raise error
    ended = mlflow.get_run(run.info.run_id)
    assert ended.info.status == "FAILED"
    assert re.match(told, ended.data.tags["failure_reason"])


def test_what_no_one_expected_leaves_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), tracked_run("test", {}) as run:
        print(1 / 0)
    ended = mlflow.get_run(run.info.run_id)
    assert (ended.info.status, ended.data.tags["failure_reason"]) == ("FAILED", "ZeroDivisionError: division by zero")
    told = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/traceback.txt")
    assert "print(1 / 0)" in told


def test_a_run_ends_failed_where_its_reason_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.mlflow, "set_tag", refuses)
    with pytest.raises(QuantrackError, match="no picture"), tracked_run("test", {}) as run:
        raise QuantrackError("no picture")
    assert mlflow.active_run() is None
    assert mlflow.get_run(run.info.run_id).info.status == "FAILED"


def test_a_run_that_cannot_be_begun_does_not_end_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "log_new_parameters", refuses)
    with pytest.raises(QuantrackError, match="the server is away"), tracked_run("begun", {}):
        pytest.fail("not reached")
    (run,) = mlflow.search_runs(filter_string="tags.entry_point = 'begun'", output_format="list")
    assert run.info.status == "FAILED"


def test_a_store_that_cannot_be_opened_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(*arguments: object, **settings: object) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setattr(runs.mlflow, "start_run", no_driver)
    with (
        pytest.raises(QuantrackError, match=r"^MLflow at sqlite:///.*: No module named 'psycopg'"),
        tracked_run("a", {}),
    ):
        pytest.fail("not reached")


def test_an_attempt_does_not_keep_the_reason_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), tracked_run("ptq", {}) as run:
        raise KeyboardInterrupt
    assert mlflow.get_run(run.info.run_id).data.tags["failure_reason"] == "interrupted"
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    with tracked_run("ptq", {}):
        pass
    again = mlflow.get_run(run.info.run_id)
    assert (again.info.status, again.data.tags.get("failure_reason")) == ("FINISHED", None)


def test_only_a_name_that_mlflow_made_up_is_replaced() -> None:
    for name, expected in ((None, "ptq-w4a8"), ("nightly-build-12", "nightly-build-12"), ("mine", "mine")):
        with mlflow.start_run(run_name=name) as run:
            name_run("ptq-w4a8")
        assert mlflow.get_run(run.info.run_id).info.run_name == expected


def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://me:secret@tracking.example/prefix"
    monkeypatch.setattr("quantrack.tracking.read.find_run", lambda run_id: None)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: address)
    with pytest.raises(QuantrackError, match=r"runs=x: no such run at https://tracking\.example/prefix; give"):
        require_run("x", "runs")


def test_a_comparison_is_dated_where_quantrack_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantrack.tracking.compare.installed_versions", dict)
    assert "by Quantrack" in _made()


def test_a_nested_run_lies_in_its_parents_experiment() -> None:
    elsewhere = mlflow.create_experiment("elsewhere")
    parent = mlflow.MlflowClient().create_run(elsewhere)
    with resumed_within(parent), tracked_run("baseline", {}, nested=True) as child:
        assert mlflow.get_run(child.info.run_id).info.experiment_id == elsewhere


@contextmanager
def resumed_within(run: Run) -> Iterator[None]:
    with tracked_run("qat", {}), resumed_run(run):
        yield


def test_a_table_logged_again_replaces_the_first() -> None:
    with tracked_run("test", {}) as run:
        log_table({"class": ["cat"], "boxes": [1]}, "classes.json")
        log_table({"class": ["cat", "dog"], "boxes": [2, 3]}, "classes.json")
    again = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/classes.json"))
    assert (again["columns"], again["data"]) == (["class", "boxes"], [["cat", 2], ["dog", 3]])


def test_only_a_refused_setting_leaves_no_folder_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while its PTQ start is being made is gone on with by `resume`, which wants the folder."""
    monkeypatch.setenv("QUANTRACK_CACHE", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), training_folder("interrupted"):
        raise KeyboardInterrupt
    with pytest.raises(UsageError), training_folder("refused"):
        raise UsageError("from_run=x: its mode is w8a8, not w4a8")
    (tmp_path / "training/under way").mkdir()
    (tmp_path / "training/under way/last.pt").touch()
    with pytest.raises(UsageError), training_folder("under way"):
        raise UsageError("recipe=fast: another than the run's")
    with training_folder("finished"):
        pass
    assert {path.name for path in (tmp_path / "training").iterdir()} == {"interrupted", "under way"}


def test_a_server_that_went_away_does_not_hold_up_the_end(
    run_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # minutes
    began = time.monotonic()
    try:
        with pytest.raises(QuantrackError, match="no picture"), tracked_run("test", {}):
            fail_where_nothing_listens()
    finally:
        mlflow.set_tracking_uri(f"sqlite:///{run_store}/mlflow.db")
        mlflow.end_run()
    assert time.monotonic() - began < 20
    said = capsys.readouterr().err
    assert "that the run is FAILED could not be recorded: MLflow at http://127.0.0.1:9" in said
    assert "Connection refused" in said


def fail_where_nothing_listens() -> None:
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    raise QuantrackError("no picture")


def test_a_server_that_is_away_is_said_at_once(
    run_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    try:
        with pytest.raises(QuantrackError, match=r"http://127.0.0.1:9: .*Connection refused"), tracked_run("t", {}):
            pytest.fail("not reached")
    finally:
        mlflow.set_tracking_uri(f"sqlite:///{run_store}/mlflow.db")
    assert "MLflow at http://127.0.0.1:9 does not answer; trying for some minutes" in capsys.readouterr().err
