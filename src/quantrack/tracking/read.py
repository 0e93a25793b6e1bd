"""What the store has of a run, read in one way everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import mlflow
from mlflow.entities import Run

from quantrack.errors import QuantrackError
from quantrack.progress import say

BASELINE_TAG = "baseline_run_id"  # of a run that was held against a float32 one
RESUMED_TAG = "resumed_run_id"  # of a run that only went on with another one
MOST_SAID = 300  # characters of somebody else's message
ABSENT = "RESOURCE_DOES_NOT_EXIST"
CREDENTIALS = re.compile(r"://(?:[^/\s@:]+:[^\s@]*|[^/\s@]+)@")


def active_run_id() -> str:
    """The id of the active run.

    Raises:
        RuntimeError: no run is active, which is a mistake in Quantrack.
    """
    active = mlflow.active_run()
    if active is None:
        raise RuntimeError("no MLflow run is active")
    return str(active.info.run_id)


def current_run() -> Run:
    """The active run as the store has it now, with what was logged since it began."""
    return mlflow.get_run(active_run_id())


def finished_runs(tags: Mapping[str, str], most: int = 100) -> list[Run]:
    """The newest finished runs with these tags in the active run's experiment, the newest first, at most so many."""
    clauses = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    runs = mlflow.search_runs(
        experiment_ids=[current_run().info.experiment_id],
        filter_string=" and ".join([*clauses, "attributes.status = 'FINISHED'"]),
        order_by=["attributes.start_time DESC"],
        max_results=most,
        output_format="list",
    )
    return list(runs)


def find_run(run_id: str) -> Run | None:
    """The run of an id; None where there is none, or it was deleted."""
    try:
        run = mlflow.get_run(run_id)
    except mlflow.MlflowException as error:
        if error.error_code in (ABSENT, "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def require_run(run_id: str, setting: str) -> Run:
    """The run whose id a setting gave; for one that only went on with another one, that one.

    Raises:
        QuantrackError: there is no such run.
    """
    run = find_run(run_id)
    resumed = run.data.tags.get(RESUMED_TAG) if run is not None else None
    if resumed is not None:
        say(f"{setting}={run_id}: went on with run {resumed}; taking that one")
        run = find_run(resumed)
    if run is None:
        which = f", with which it went on: {resumed}," if resumed else ""
        raise QuantrackError(
            f"{setting}={run_id}: no such run{which} at {store_address()}; give the id of one that is there, or set "
            "MLFLOW_TRACKING_URI to where it is"
        )
    return run


def store_address() -> str:
    """The tracking store's address, without the user and the password that it may hold."""
    return without_credentials(str(mlflow.get_tracking_uri()))


def without_credentials(text: str) -> str:
    """A text without the user and the password of the addresses in it, as it may be shown to everybody.

    >>> without_credentials("no answer from https://me:a/b@host/api"), without_credentials("sqlite:///me@work/mlflow.db")
    ('no answer from https://host/api', 'sqlite:///me@work/mlflow.db')
    """
    return CREDENTIALS.sub("://", text)


def one_line(error: Exception) -> str:
    """What a store or a library says, without line breaks and credentials; of a long text its two ends.

    >>> one_line(ValueError("many " * 100 + "refused")).replace("many ", "")
    '... refused'
    """
    text = without_credentials(" ".join(str(error).split()))
    if len(text) <= MOST_SAID:
        return text
    start, end = text[: MOST_SAID // 2], text[-MOST_SAID // 2 :]  # the reason tends to stand last
    return f"{start.rpartition(' ')[0]} ... {end.partition(' ')[2]}"


def read_json(run_id: str, name: str) -> Mapping[str, Any]:
    """A JSON artifact of a run.

    Raises:
        QuantrackError: it is not there, or cannot be read.
    """
    try:
        content: Mapping[str, Any] = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/{name}"))
    except Exception as error:  # stores raise their own kinds
        raise QuantrackError(
            f"run {run_id}: {name} cannot be read ({one_line(error)}); give a run that logged it"
        ) from error
    return content


def has_artifact(run_id: str, name: str) -> bool:
    """Whether a run logged an artifact of this name at the top."""
    return name in {entry.path for entry in mlflow.MlflowClient().list_artifacts(run_id)}


def evaluation_name(run: Run) -> str:
    """The name of the pictures that a run was evaluated on."""
    for used in run.inputs.dataset_inputs if run.inputs else ():
        if any(tag.value == "evaluation" for tag in used.tags):
            return str(used.dataset.name)
    return "unnamed pictures"
