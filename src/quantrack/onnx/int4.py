"""Store weights of at most 4 bits as ONNX INT4, two in a byte; the values stay the same.

INT4 needs opset 21 (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html). No Clip is needed, as the
type itself bounds the integers.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quantrack.errors import QuantrackError
from quantrack.onnx.graph import Graph, write_graph
from quantrack.onnx.opset import load_newer

LOWEST, HIGHEST = -8, 7


def store_as_int4(source: Path, target: Path) -> int:
    """Write a copy of a cleaned QCDQ file with its 4-bit weights packed; returns how many tensors were.

    DequantizeLinear takes the packed weights, with one scale a channel. Where the convolution's result is
    quantized, they are cast to INT8 first: ONNX Runtime does that once as it loads the file, and makes
    integer kernels only of INT8 weights.

    Raises:
        QuantrackError: no weight is within 4 bits.
    """
    graph = Graph(load_newer(source))
    packed = [node for node in graph.nodes if fits_int4(graph, node)]
    if not packed:
        raise QuantrackError(f"{source}: no weight is within 4 bits; weight_storage=int4 needs w4a8 or w4a16")
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if any(node is each for each in packed):
            nodes += _packed(graph, node)
        nodes.append(node)
    graph.replace(nodes)
    write_graph(graph, target)
    return len(packed)


def fits_int4(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether this dequantizes INT8 weights of a convolution that all lie in -8 to 7."""
    if node.op_type != "DequantizeLinear" or node.input[0] not in graph.initializers:
        return False
    if convolution_of(graph, node.output[0]) is None:
        return False
    integers = graph.array(node.input[0]).astype(np.int64)
    return bool(integers.min() >= LOWEST and integers.max() <= HIGHEST)


def convolution_of(graph: Graph, weights: str) -> onnx.NodeProto | None:
    """The convolution that takes these weights, multiplied by the scales of its input's channels or not."""
    for node in graph.consumers[weights]:
        if node.op_type == "Conv" and node.input[1] == weights:
            return node
        if node.op_type == "Mul" and node.input[0] == weights:
            return convolution_of(graph, node.output[0])
    return None


def _packed(graph: Graph, dequantize: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Let a DequantizeLinear take packed weights; returns the node that must go before it, if any."""
    name = f"{dequantize.input[0]}/int4"
    integers = graph.array(dequantize.input[0])
    graph.model.graph.initializer.append(numpy_helper.from_array(_as_int4(integers), name))
    convolution = convolution_of(graph, dequantize.output[0])
    assert convolution is not None
    if any(node.op_type == "QuantizeLinear" for node in graph.consumers[convolution.output[0]]):
        dequantize.input[0] = f"{name}/int8"
        return [helper.make_node("Cast", [name], [f"{name}/int8"], name=f"{name}/Cast", to=onnx.TensorProto.INT8)]
    dequantize.input[0] = name
    if len(dequantize.input) > 2:
        del dequantize.input[2]  # zero, and of the wrong type now
    return []


def _as_int4(integers: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.asarray(integers.astype(ml_dtypes.int4))
