"""The exported model as an MLflow LoggedModel, and ONNX files found again by URI."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModel
from mlflow.models import Model
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from mlflow.store.artifact.utils.models import get_model_name_and_version

from quantrack.datasets.coco import EvaluationSet
from quantrack.errors import QuantrackError
from quantrack.files import file_digest
from quantrack.quantization.bit_plan import BitPlan, read_plan
from quantrack.tracking import detector_flavor
from quantrack.tracking.log import evaluation_dataset
from quantrack.tracking.read import BASELINE_TAG, current_run, find_run, has_artifact, one_line

# of MLflow, which leaves them without types
split_models_uri: Callable[[str], tuple[str, str]] = ModelsArtifactRepository.split_models_uri
name_and_version: Callable[[mlflow.MlflowClient, str], tuple[str | int, ...]] = get_model_name_and_version
VERSION_TAG = "onnx_version"  # of a run that was given a model by an alias or as the latest
NOT_IN_NAMES = re.compile(r"[/:.%\"'\s]+")  # MLflow refuses them in the name of a LoggedModel


def log_model(path: Path, name: str, metrics: Mapping[str, float], evaluation_set: EvaluationSet) -> None:
    """Log the file that was run as a model that takes pictures, linked to the run's metrics and the evaluation set.

    One that an earlier, interrupted attempt of the run has logged goes: a run has one model.
    """
    info = Model.log(
        artifact_path=None,
        name=NOT_IN_NAMES.sub("-", name),
        flavor=detector_flavor,
        onnx_file=path,
        validate_serving_input=False,  # MLflow would load the model again here; it is the file just measured
    )
    mlflow.log_metrics(dict(metrics), model_id=info.model_id, dataset=evaluation_dataset(evaluation_set))
    _delete_earlier_models(info.model_id)


def _delete_earlier_models(newest: str | None) -> None:
    """Of the active run, unless a version was registered from it."""
    run, client = current_run().info, mlflow.MlflowClient()
    if client.search_model_versions(f"run_id = '{run.run_id}'"):
        return
    for model in models_of_run(run.experiment_id, run.run_id):
        if model.model_id != newest:
            client.delete_logged_model(model.model_id)


def models_of_run(experiment_id: str, run_id: str) -> list[LoggedModel]:
    """The models that a run has logged."""
    found = mlflow.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{run_id}'", output_format="list"
    )
    return list(found)


def fetch(reference: str, setting: str, folder: Path) -> Path:
    """The file or folder behind the path, `runs:/...` or `models:/...` that a setting gave.

    Raises:
        QuantrackError: there is no such file, run or model.
    """
    if not reference.startswith(("runs:/", "models:/")):
        path = Path(reference)
        if not path.is_file():
            raise QuantrackError(f"{setting}={reference}: no such file; give a file, runs:/... or models:/...")
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=str(folder)))
    except Exception as error:  # stores raise their own kinds
        raise QuantrackError(_cannot_fetch(setting, reference, error)) from error


def _cannot_fetch(setting: str, reference: str, error: Exception) -> str:
    forms = "runs:/RUN_ID/PATH, models:/NAME@ALIAS or a file"
    return f"{setting}={reference}: MLflow cannot fetch it ({one_line(error)}); give {forms}"


def log_given_file(given: str, version: str, path: Path) -> None:
    """Tag the active run with which file `onnx` was: an alias may move, a path be overwritten."""
    mlflow.set_tags({"onnx_digest": file_digest(path)} | ({VERSION_TAG: version} if version != given else {}))


def of_a_version(reference: str, setting: str = "onnx") -> str:
    """`models:/NAME/VERSION/PATH` for what an alias, a stage or `latest` stands for now; others as they are.

    Raises:
        QuantrackError: there is no such model, or nothing that it stands for.
    """
    if not reference.startswith("models:/"):
        return reference
    try:
        model, path = split_models_uri(reference)
        found = name_and_version(mlflow.MlflowClient(), model)
    except Exception as error:  # stores raise their own kinds
        raise QuantrackError(_cannot_fetch(setting, reference, error)) from error
    if len(found) == 1:  # a LoggedModel, which has no versions
        return reference
    return "/".join(["models:", *map(str, found), *([path] if path else [])])


@contextmanager
def errors_in_terms_of(setting: str, reference: str, path: Path) -> Iterator[None]:
    """Word errors about a fetched file in terms of the setting and of what the user gave."""
    try:
        yield
    except QuantrackError as error:
        message = str(error).replace(f"onnx={path}", f"{setting}={reference}").replace(str(path), reference)
        raise type(error)(message) from error


def float_file_of(reference: str) -> str:
    """Where the float32 baseline of the run behind `runs:/...` or `models:/...` lies; empty if nowhere."""
    run_id = _run_behind(reference)
    run = find_run(run_id) if run_id else None
    baseline = run.data.tags.get(BASELINE_TAG, "") if run else ""
    there = baseline and find_run(baseline) and has_artifact(baseline, "onnx")
    return f"runs:/{baseline}/onnx" if there else ""


def _run_behind(reference: str) -> str | None:
    if reference.startswith("runs:/"):
        return reference.removeprefix("runs:/").partition("/")[0]
    if not reference.startswith("models:/"):
        return None
    try:
        model, _ = split_models_uri(reference)  # of a file within it, too
        return mlflow.models.get_model_info(model).run_id
    except mlflow.MlflowException:  # a model that says nothing of its run
        return None


def fetch_plan(reference: str) -> BitPlan:
    """The bit plan behind a path or `runs:/...`.

    Raises:
        QuantrackError: there is no such file or run, or it holds no plan.
    """
    with tempfile.TemporaryDirectory() as folder:
        return read_plan(fetch(reference, "plan", Path(folder)))


def fetch_onnx(reference: str, folder: Path, setting: str = "onnx") -> Path:
    """The ONNX file behind a path, `runs:/...` or `models:/...`; remote ones are copied to `folder`.

    Raises:
        QuantrackError: there is no such file, run or model, or the reference holds no ONNX file.
    """
    fetched = fetch(reference, setting, folder)
    if fetched.is_file():
        return fetched
    found = sorted(fetched.rglob("*-opt.onnx")) or sorted(fetched.rglob("*.onnx"))
    if not found:
        raise QuantrackError(f"{setting}={reference}: holds no ONNX file; name one, for example {reference}/FILE.onnx")
    return found[0]
