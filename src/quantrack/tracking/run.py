"""One MLflow run around the work, which ends FINISHED, FAILED or KILLED with the reason as a tag."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlflow
from mlflow.entities import Run

from quantrack.errors import QuantrackError
from quantrack.tracking.environment import git_commit

REASON_TAG = "failure_reason"
MAX_TAG = 5000
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d{1,3}")


@contextmanager
def tracked_run(entry: str, parameters: Mapping[str, str], *, nested: bool = False) -> Iterator[mlflow.ActiveRun]:
    """Start a run, or resume the one that `mlflow run` started for this process.

    Parameters that are already logged are left as they are: MLflow refuses to change one, and
    `mlflow run` has logged its `-P` values as typed.

    Raises:
        QuantrackError: the tracking store cannot be reached.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        run = mlflow.start_run(nested=nested)
        mlflow.set_tags({"entry_point": entry} | git_commit())
        log_new_parameters(parameters)
    except mlflow.MlflowException as error:
        raise QuantrackError(f"MLflow at {mlflow.get_tracking_uri()}: {_one_line(error)}") from error
    with _ended_as_the_work_ends():
        yield run


@contextmanager
def resumed_run(run: Run) -> Iterator[None]:
    """Go on with a run that has not finished, within the active one.

    Raises:
        QuantrackError: the run has finished.
    """
    if run.info.status == "FINISHED":
        raise QuantrackError(f"resume={run.info.run_id}: the run has finished; there is nothing to go on with")
    mlflow.set_tag("resumed_run_id", run.info.run_id)
    mlflow.start_run(run_id=run.info.run_id, nested=True)
    mlflow.set_tags(git_commit())
    if REASON_TAG in run.data.tags:
        mlflow.delete_tag(REASON_TAG)
    with _ended_as_the_work_ends():
        yield


@contextmanager
def _ended_as_the_work_ends() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _end("KILLED", "interrupted")
        raise
    except QuantrackError as error:
        _end("FAILED", str(error))
        raise
    except BaseException as error:
        _end("FAILED", f"{type(error).__name__}: {error}")
        raise
    mlflow.end_run("FINISHED")


def log_new_parameters(parameters: Mapping[str, str]) -> None:
    """Log the parameters that the active run does not have yet."""
    run = mlflow.active_run()
    known = mlflow.get_run(run.info.run_id).data.params if run else {}
    mlflow.log_params({name: value for name, value in parameters.items() if name not in known})


def name_run(name: str) -> None:
    """Name the active run, unless the user did: only a name that MLflow made up is replaced."""
    active = mlflow.active_run()
    current = mlflow.get_run(active.info.run_id).info.run_name if active else None
    if not current or GENERATED_NAME.fullmatch(current):
        mlflow.set_tag("mlflow.runName", name)


def _end(status: str, reason: str) -> None:
    mlflow.set_tag(REASON_TAG, reason[:MAX_TAG])
    mlflow.end_run(status)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
