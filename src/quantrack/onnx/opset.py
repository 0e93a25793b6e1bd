"""Turn a model into a newer opset, for types that quantizers lack in older ones."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import version_converter

from quantrack.errors import QuantrackError
from quantrack.onnx.inspect import load_onnx

NEWER = 21  # INT4, and float16 scales (19)
IR_VERSION = 10  # the first that has INT4


def load_newer(path: Path) -> onnx.ModelProto:
    """A file as a model of opset 21.

    Raises:
        QuantrackError: the file is missing or is not ONNX, or cannot be converted.
    """
    older = load_onnx(path)
    try:
        model = version_converter.convert_version(older, NEWER)
    except Exception as error:  # the converter raises whatever its adapters meet
        raise QuantrackError(f"{path}: cannot be turned into opset {NEWER} ({' '.join(str(error).split())})") from error
    for function in older.functions:  # the converter leaves them out; what they are made of has not changed
        model.functions.append(function)
        for item in model.functions[-1].opset_import:
            if not item.domain:
                item.version = NEWER
    model.ir_version = max(model.ir_version, IR_VERSION)
    return model
