"""Whether ONNX Runtime's integer convolutions add exactly on this processor."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

EXACT = "session.x64quantprecision"
"""The session option that multiplies unsigned by unsigned bytes, in wider and slower steps that cannot saturate."""

CHANNELS, LARGEST, RESULT = 16, (255, 127), 200


@cache
def sums_are_exact() -> bool:
    """Whether a convolution of the largest bytes has the right sum, tried on a tensor of one pixel.

    x86 processors with AVX2 and without VNNI add the products of two neighbouring bytes in 16 bits and cut what
    does not fit, which 8-bit weights reach (ONNX Runtime's documentation of quantization, on U8S8 and reduce_range).
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(_largest_sum().SerializeToString(), options, providers=["CPUExecutionProvider"])
    image = np.full((1, CHANNELS, 1, 1), LARGEST[0], np.uint8)
    return bool((np.asarray(session.run(None, {"x": image})[0]) == RESULT).all())


def _largest_sum() -> ModelProto:
    """A 1x1 QLinearConv of four channels that each sum up `LARGEST`'s product over all inputs, scaled to `RESULT`."""
    values: dict[str, NDArray[np.generic] | np.generic] = {
        "x scale": np.float32(1), "x zero": np.uint8(0),
        "w": np.full((4, CHANNELS, 1, 1), LARGEST[1], np.int8), "w scale": np.float32(1), "w zero": np.int8(0),
        "y scale": np.float32(LARGEST[0] * LARGEST[1] * CHANNELS / RESULT), "y zero": np.uint8(0),
    }  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", ["x", *values], ["y"])],
        "largest sum",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, CHANNELS, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 4, 1, 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
