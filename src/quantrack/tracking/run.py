"""One MLflow run around the work, which ends FINISHED, FAILED or KILLED with the reason as a tag."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlflow
import requests
from mlflow.entities import Run
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

from quantrack.cache import variable_kept
from quantrack.errors import QuantrackError, memory_problem, place_and_reason
from quantrack.progress import say
from quantrack.tracking.environment import git_commit
from quantrack.tracking.read import (
    RESUMED_TAG,
    active_run_id,
    current_run,
    one_line,
    store_address,
    without_credentials,
)

REASON_TAG = "failure_reason"
MAX_TAG = 5000
ANSWER_WITHIN = 10.0  # seconds
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


@contextmanager
def tracked_run(entry: str, parameters: Mapping[str, str], *, nested: bool = False) -> Iterator[mlflow.ActiveRun]:
    """Start a run, or resume the one that `mlflow run` started for this process.

    Parameters that are already logged are left as they are: MLflow refuses to change one, and
    `mlflow run` has logged its `-P` values as typed.

    Raises:
        QuantrackError: the tracking store cannot be reached.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # without the parent's experiment named, that of the environment would be taken
    experiment_id = current_run().info.experiment_id if nested else None
    if not nested:
        say_if_away()
    try:
        run = _started(nested, experiment_id)
    except Exception as error:  # a database's driver raises its own kinds
        raise QuantrackError(store_problem(error)) from error
    with _ended_as_the_work_ends():
        _forget_reason(run)
        mlflow.set_tags({"entry_point": entry} | git_commit())
        log_new_parameters(parameters)
        yield run


def _started(nested: bool, experiment_id: str | None) -> mlflow.ActiveRun:
    try:
        return mlflow.start_run(nested=nested, experiment_id=experiment_id)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return mlflow.start_run(nested=nested, experiment_id=experiment_id)  # another process made the experiment


def store_answers() -> bool:
    """Whether a tracking server answers at all; MLflow itself tries for minutes, and is silent. Files always do."""
    address = str(mlflow.get_tracking_uri())
    if not address.startswith(("http://", "https://")):
        return True
    try:
        requests.get(address, timeout=ANSWER_WITHIN)
    except requests.exceptions.SSLError:  # MLflow may have certificates of its own
        return True
    except (requests.ConnectionError, requests.Timeout):
        return False
    return True


def say_if_away() -> None:
    """Tell the user why nothing happens for a while."""
    if not store_answers():
        say(f"MLflow at {store_address()} does not answer; trying for some minutes (MLFLOW_TRACKING_URI names another)")


@contextmanager
def resumed_run(run: Run) -> Iterator[None]:
    """Go on with a run that has not finished, within the active one."""
    mlflow.set_tag(RESUMED_TAG, run.info.run_id)
    mlflow.start_run(run_id=run.info.run_id, nested=True)
    with _ended_as_the_work_ends():
        mlflow.set_tags(git_commit())
        _forget_reason(run)
        yield


def _forget_reason(run: Run) -> None:
    """Why an earlier attempt in the same run has failed."""
    if REASON_TAG in run.data.tags:
        mlflow.delete_tag(REASON_TAG)


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
    except Exception as error:
        told = _in_one_line(error)
        foreseen = isinstance(error, mlflow.MlflowException) or memory_problem(error)
        _end("FAILED", told or f"{type(error).__name__}: {error}", "" if foreseen else traceback.format_exc())
        if told:
            raise QuantrackError(told) from error
        raise
    except BaseException as error:
        _end("FAILED", f"{type(error).__name__}: {error}")
        raise
    try:
        say_if_away()
        mlflow.end_run("FINISHED")
    except mlflow.MlflowException as error:
        raise QuantrackError(store_problem(error)) from error


def _in_one_line(error: Exception) -> str | None:
    """What to tell of an error of the store or the machine; None for others, which are mistakes in Quantrack."""
    if isinstance(error, mlflow.MlflowException):
        return store_problem(error)
    if isinstance(error, OSError) and not memory_problem(error):
        return place_and_reason(error) if error.strerror else one_line(error)
    return memory_problem(error)


def store_problem(error: Exception) -> str:
    """What MLflow or its database says, in one line, and where."""
    return f"MLflow at {store_address()}: {one_line(error)}"


def log_new_parameters(parameters: Mapping[str, str]) -> None:
    """Log the parameters that the active run does not have yet."""
    known = current_run().data.params
    mlflow.log_params({name: value for name, value in parameters.items() if name not in known})


def name_run(name: str) -> None:
    """Name the active run, unless the user did: only a name that MLflow made up is replaced."""
    current = current_run().info.run_name
    if not current or _made_up(current):
        mlflow.set_tag("mlflow.runName", name)


def _made_up(name: str) -> bool:
    """Whether MLflow's generator may have made a name: two of its words and a number."""
    predicate, _, rest = name.partition("-")
    noun, _, number = rest.partition("-")
    return predicate in _GENERATOR_PREDICATES and noun in _GENERATOR_NOUNS and number.isdecimal()


def _end(status: str, reason: str, trace: str = "") -> None:
    """End the active run, whatever becomes of the tag and of the traceback: MLflow ends one left open as FINISHED."""
    run_id = active_run_id()
    try:
        with _no_retries_where_away():
            try:
                mlflow.set_tag(REASON_TAG, reason[:MAX_TAG])
                if trace:
                    mlflow.log_text(without_credentials(trace), "traceback.txt")
            finally:
                mlflow.end_run(status)
    except mlflow.MlflowException as error:
        say(f"that the run is {status} could not be recorded: {store_problem(error)}")
    finally:
        left = mlflow.active_run()
        if left is not None and left.info.run_id == run_id:  # interrupted again, while the server was asked
            mlflow.end_run(status)


@contextmanager
def _no_retries_where_away() -> Iterator[None]:
    """MLflow would try each call for minutes, and there are several."""
    if store_answers():
        yield
        return
    with variable_kept(RETRIES):
        os.environ[RETRIES] = "0"
        yield
