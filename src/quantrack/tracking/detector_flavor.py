"""How a measured ONNX file is saved as an MLflow model: flavours `onnx` and `python_function`."""

from __future__ import annotations

import base64
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import cv2
import mlflow.pyfunc
import numpy as np
import onnx
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property

from quantrack.evaluation.picture_detector import CONFIDENCE
from quantrack.runtime.session import CPU, CUDA, FULL_NAMES
from quantrack.schemes import MAX_DETECTIONS

LOADER = "quantrack.tracking.served_model"
PACKAGE = Path(__file__).resolve().parents[1]
# What the loader imports, and nothing else: neither Brevitas nor Ultralytics is needed to serve.
SERVED_CODE = (
    "__init__.py", "errors.py", "files.py", "progress.py", "schemes.py",
    "datasets/__init__.py", "datasets/picture_size.py", "datasets/pictures.py",
    "evaluation/__init__.py", "evaluation/decode.py", "evaluation/picture_detector.py", "evaluation/types.py",
    "onnx/__init__.py", "onnx/inspect.py",
    "runtime/__init__.py", "runtime/exact_sums.py", "runtime/session.py",
    "tracking/__init__.py", "tracking/served_model.py",
)  # fmt: skip
SERVING_PACKAGES = (
    "mlflow", "numpy", "onnx", "onnxruntime-gpu", "opencv-python", "rich", "torch", "torchvision",
)  # fmt: skip


def save_model(path: str, mlflow_model: Model, onnx_file: Path, **for_mlflow: object) -> None:
    """MLflow's hook for `Model.log(flavor=this module)`.

    The ONNX file lies in the model once, its bytes as they were measured; both flavours read it.
    `Model.log` hands on keywords that are its own; they are not needed here.
    """
    mlflow_model.add_flavor(
        "onnx",
        onnx_version=onnx.__version__,
        data=f"data/{onnx_file.name}",
        providers=[FULL_NAMES[CUDA], FULL_NAMES[CPU]],
        onnx_session_options=None,
        code=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(
            path,
            loader_module=LOADER,
            data_path=str(onnx_file),
            code_paths=[str(_copy_code(Path(folder) / "code"))],
            mlflow_model=mlflow_model,
            signature=detector_signature(),
            input_example=[example_picture()],
            pip_requirements=serving_requirements(),
            # MLflow would add this project's own uv.lock, whose packages would then be installed to serve
            uv_project_path=folder,
        )


def detector_signature() -> ModelSignature:
    """The parameters and the result.

    The input has no schema: MLflow would make a table of it, which an array is not.
    """
    box = Object(
        [
            Property("box", Array(DataType.double)),
            Property("class", DataType.string),
            Property("class_id", DataType.long),
            Property("score", DataType.double),
        ]
    )
    parameters = [
        ParamSpec("confidence", DataType.double, CONFIDENCE),
        ParamSpec("max_detections", DataType.long, MAX_DETECTIONS),
    ]
    return ModelSignature(outputs=Schema([ColSpec(Array(box), "detections")]), params=ParamSchema(parameters))


def serving_requirements() -> list[str]:
    """Exact versions of what the loader imports.

    Three equal signs for torch, as in pyproject.toml: pip must not take a local build.
    """
    pins = {package: version(package).partition("+")[0] for package in SERVING_PACKAGES}
    return [f"{package}{'===' if package == 'torch' else '=='}{pin}" for package, pin in pins.items()]


def example_picture() -> str:
    """A small grey PNG as base64 text: the input example that MLflow's pages show."""
    _, content = cv2.imencode(".png", np.full((24, 32, 3), 114, dtype=np.uint8))
    return base64.b64encode(content.tobytes()).decode("ascii")


def _copy_code(folder: Path) -> Path:
    """A `quantrack` package with only the files that serving needs."""
    package = folder / PACKAGE.name
    for name in SERVED_CODE:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / name, package / name)
    return package
