"""Watch tensors inside an ONNX file as it runs over pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from quantrack.errors import QuantrackError
from quantrack.onnx.activation_grid import ObservedRange
from quantrack.onnx.inspect import load_onnx
from quantrack.progress import track
from quantrack.runtime.session import open_session


def observe_tensors(
    path: Path, tensors: Sequence[str], pictures: Iterable[NDArray[np.float32]], count: int, provider: str
) -> dict[str, ObservedRange]:
    """Ranges of named float tensors over `count` inputs [1, 3, imgsz, imgsz].

    Raises:
        QuantrackError: a tensor is not finite.
    """
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(_tapped(path, tensors, Path(folder) / path.name), provider)
        name = session.inference.get_inputs()[0].name
        for picture in track(pictures, "observing activations", count):
            for place, values in enumerate(session.inference.run(list(tensors), {name: picture})):
                low[place], high[place] = np.minimum(low[place], values.min()), np.maximum(high[place], values.max())
    if unknown := [tensor for tensor, ends in zip(tensors, low + high, strict=True) if not np.isfinite(ends)]:
        raise QuantrackError(f"{path}: {unknown[0]} is not finite on the calibration pictures; check the weights")
    return {tensor: ObservedRange(float(low[place]), float(high[place])) for place, tensor in enumerate(tensors)}


def _tapped(source: Path, tensors: Sequence[str], target: Path) -> Path:
    """A copy of the file that gives these tensors as outputs as well."""
    model = load_onnx(source)
    already = {output.name for output in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in tensors
        if name not in already
    )
    onnx.save(model, str(target))
    return target
