"""The logged model as MLflow loads and serves it: pictures in, boxes with class names and scores out.

`mlflow.pyfunc.load_model(URI).predict(pictures)` takes one picture or a list of them: a path, the file's
bytes, those bytes as base64 text, or an RGB uint8 array of shape [height, width, 3]. Over HTTP each is
base64 text: `{"inputs": ["..."]}` or `{"dataframe_records": [{"image": "..."}]}`, with
`"params": {"confidence": 0.25, "max_detections": 300}` if wanted.

The result has one entry per picture, a list of its detections, best score first:
`{"box": [x1, y1, x2, y2], "class": "dog", "class_id": 18, "score": 0.93}`, with boxes in the picture's
own pixels (after its EXIF orientation) and COCO's category id.

The model carries a copy of this file and of those it imports (`SERVED_CODE` in `detector_flavor.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

from quantrack.errors import QuantrackError
from quantrack.evaluation.decode import NmsSettings
from quantrack.evaluation.picture_detector import (
    PictureDetector,
    base64_picture,
    detection_settings,
    open_picture_detector,
    to_picture,
)

COLUMN = "image"
HOW_TO_SEND = f'send {{"inputs": ["<base64>"]}} or {{"dataframe_records": [{{"{COLUMN}": "<base64>"}}]}}'

# MLflow's scoring server sets the first when it has loaded the model (`mlflow models predict` sets it too), and is
# started with the second. In such a process whatever arrives comes from a stranger: a text that named a path would
# make any file of the server readable, or at least tell whether it is there. So only base64 is taken there.
# A server of one's own around `load_model` has neither; it must pass bytes, not text.
SERVER_MARKS = ("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "__pyfunc_model_path__")


class PredictionError(MlflowException):
    """A refused request or a failed prediction, in one line."""

    def serialize_as_json(self) -> str:
        """The response's body. The scoring server has put the whole input before `message` by now."""
        self.message = str(self)
        return str(super().serialize_as_json())  # type: ignore[no-untyped-call]


class ServedDetector:
    """What `mlflow.pyfunc.load_model` wraps; it keeps one session, which several threads may use."""

    def __init__(self, detector: PictureDetector) -> None:
        self._detector = detector

    def predict(self, model_input: object, params: Mapping[str, float] | None = None) -> list[list[dict[str, object]]]:
        """One list of detections per picture; see this file's docstring.

        Raises:
            PredictionError: a picture or parameter is refused (HTTP 400), or the network failed (500).
        """
        try:
            settings = _settings(params or {})
            items = _items(model_input)
        except QuantrackError as error:
            raise PredictionError(str(error), INVALID_PARAMETER_VALUE) from error
        return [
            self._predict_one(item, f"item {place} of {len(items)}", settings)
            for place, item in enumerate(items, start=1)
        ]

    def _predict_one(self, item: object, place: str, settings: NmsSettings) -> list[dict[str, object]]:
        try:
            picture = base64_picture(item) if _in_server() else to_picture(item)
        except QuantrackError as error:
            raise PredictionError(f"{place}: {error}", INVALID_PARAMETER_VALUE) from error
        try:
            return self._detector.records(self._detector.detect(picture, settings))
        except QuantrackError as error:
            raise PredictionError(f"{place}: {error}", INTERNAL_ERROR) from error


def _load_pyfunc(path: str) -> ServedDetector:
    """MLflow's hook: open the model's ONNX file, on CUDA where it is there."""
    return ServedDetector(open_picture_detector(Path(path), "auto"))


def _in_server() -> bool:
    return any(os.environ.get(mark) for mark in SERVER_MARKS)


def _settings(params: Mapping[str, float]) -> NmsSettings:
    known = {name: params[name] for name in ("confidence", "max_detections") if params.get(name) is not None}
    return detection_settings(**known)  # type: ignore[arg-type]  # MLflow has checked the types


def _items(model_input: object) -> list[object]:
    """The batch as a list, from whatever form MLflow parsed it to."""
    if isinstance(model_input, Mapping | pd.DataFrame):
        return _items(_column(model_input))
    if isinstance(model_input, np.ndarray):
        items = _array_items(model_input)
    elif isinstance(model_input, list | tuple | pd.Series):
        items = [one for item in model_input for one in (_items(item) if isinstance(item, Mapping) else [item])]
    else:
        items = [model_input]
    if not items:
        raise QuantrackError(f"no picture in the batch; {HOW_TO_SEND}")
    return items


def _array_items(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> list[object]:
    """MLflow parses JSON lists of texts to arrays of texts; numbers are one picture, or several in four dimensions."""
    if array.dtype.kind not in "OSU":
        return list(array) if array.ndim == 4 else [array] if array.size else []
    rows = np.atleast_1d(array)
    if rows.size != len(rows):
        raise QuantrackError(f"texts in {len(rows)} rows of {rows.size // len(rows)}, not one by one; {HOW_TO_SEND}")
    return list(rows.reshape(-1))


def _column(table: Mapping[str, object] | pd.DataFrame) -> object:
    if COLUMN not in table:
        raise QuantrackError(f'columns {[str(name) for name in table]} lack "{COLUMN}"; {HOW_TO_SEND}')
    if isinstance(table, pd.DataFrame) and list(table.columns).count(COLUMN) > 1:
        raise QuantrackError(f'more than one column "{COLUMN}"; {HOW_TO_SEND}')
    return table[COLUMN]
