"""The exported model as an MLflow LoggedModel, and ONNX files found again by URI."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
import mlflow.onnx
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from quantrack.datasets.coco import EvaluationSet
from quantrack.errors import QuantrackError
from quantrack.onnx.export import INPUT_NAME, OUTPUT_NAME
from quantrack.onnx.inspect import load_onnx
from quantrack.quantization.bit_plan import BitPlan, read_plan
from quantrack.tracking.environment import installed_versions
from quantrack.tracking.log import evaluation_dataset

SERVING_PACKAGES = ("mlflow", "numpy", "onnx", "onnxruntime-gpu")


def log_model(path: Path, name: str, metrics: Mapping[str, float], evaluation_set: EvaluationSet) -> None:
    """Log the file that was run, and the run's metrics linked to it and to the evaluation set."""
    model = load_onnx(path)
    versions = installed_versions()
    info = mlflow.onnx.log_model(
        model,
        name=name,
        signature=_signature(path),
        save_as_external_data=False,  # one file, as it was measured
        pip_requirements=[f"{package}=={versions[package]}" for package in SERVING_PACKAGES],
    )
    mlflow.log_metrics(dict(metrics), model_id=info.model_id, dataset=evaluation_dataset(evaluation_set))


def _signature(path: Path) -> ModelSignature:
    graph = load_onnx(path).graph
    shapes = [
        tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in (graph.input[0], graph.output[0])
    ]
    kind = np.dtype(np.float32)
    inputs = Schema([TensorSpec(kind, shapes[0], INPUT_NAME)])
    return ModelSignature(inputs=inputs, outputs=Schema([TensorSpec(kind, shapes[1], OUTPUT_NAME)]))


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
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=str(folder)))
    except Exception as error:  # stores raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise QuantrackError(f"{setting}={reference}: MLflow cannot fetch it ({reason})") from error


def fetch_plan(reference: str) -> BitPlan:
    """The bit plan behind a path or `runs:/...`.

    Raises:
        QuantrackError: there is no such file or run, or it holds no plan.
    """
    with tempfile.TemporaryDirectory() as folder:
        return read_plan(fetch(reference, "plan", Path(folder)))


def fetch_onnx(reference: str, folder: Path) -> Path:
    """The ONNX file behind a path, `runs:/...` or `models:/...`; remote ones are copied to `folder`.

    Raises:
        QuantrackError: there is no such file, run or model, or the reference holds no ONNX file.
    """
    fetched = fetch(reference, "onnx", folder)
    if fetched.is_file():
        return fetched
    found = sorted(fetched.rglob("*-opt.onnx")) or sorted(fetched.rglob("*.onnx"))
    if not found:
        raise QuantrackError(f"onnx={reference}: holds no ONNX file; name one, for example {reference}/FILE.onnx")
    return found[0]
