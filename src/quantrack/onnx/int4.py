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
from onnx import helper

from quantrack.errors import QuantrackError
from quantrack.onnx.graph import Graph, write_graph
from quantrack.onnx.opset import load_newer

LOWEST, HIGHEST = -8, 7
ORDER_BYTES, NODES_BYTES = 4, 1000  # of a channel's place, and of three nodes and their names


def store_as_int4(source: Path, target: Path) -> int:
    """Write a copy of a cleaned QCDQ file with its 4-bit weights packed; returns how many tensors were.

    DequantizeLinear takes the packed weights, with one scale a channel. Where the convolution's result is
    quantized, they are cast to INT8 first: ONNX Runtime does that once as it loads the file, and makes
    integer kernels only of INT8 weights. So they are where only some output channels are within 4 bits: these are
    packed, and put back among the others.

    Raises:
        QuantrackError: no weight is within 4 bits.
    """
    graph = Graph(load_newer(source))
    graph.give_own_constants()
    packed = 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        narrow = narrow_channels(graph, node)
        if narrow is not None and (narrow.all() or _worth_packing(graph, node, narrow)):
            nodes += _packed(graph, node) if narrow.all() else _partly_packed(graph, node, narrow)
            packed += 1
        nodes.append(node)
    if not packed:
        raise QuantrackError(
            "weight_storage=int4: no weight is within 4 bits; give w4a8 or w4a16, and plan_bits, avg_bits or a plan "
            "that has such"
        )
    graph.replace(nodes)
    write_graph(graph, target)
    return packed


def narrow_channels(graph: Graph, node: onnx.NodeProto) -> NDArray[np.bool_] | None:
    """Which output channels of a convolution's INT8 weights lie in -8 to 7 [O]; None if it dequantizes no such."""
    if node.op_type != "DequantizeLinear" or node.input[0] not in graph.initializers:
        return None
    if convolution_of(graph, node.output[0]) is None:
        return None
    integers = graph.array(node.input[0]).astype(np.int64)
    rows = integers.reshape(len(integers), -1)
    return np.asarray((rows.min(axis=1) >= LOWEST) & (rows.max(axis=1) <= HIGHEST))


def _worth_packing(graph: Graph, dequantize: onnx.NodeProto, narrow: NDArray[np.bool_]) -> bool:
    """Whether packing these channels only saves more than it costs to say which they are."""
    integers = graph.array(dequantize.input[0])
    saved = int(narrow.sum()) * integers[0].size // 2
    return bool(saved > ORDER_BYTES * len(integers) + NODES_BYTES)


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
    graph.add(name, _as_int4(integers))
    convolution = convolution_of(graph, dequantize.output[0])
    assert convolution is not None
    if any(node.op_type == "QuantizeLinear" for node in graph.consumers[graph.activated(convolution.output[0])]):
        dequantize.input[0] = f"{name}/int8"
        return [helper.make_node("Cast", [name], [f"{name}/int8"], name=f"{name}/Cast", to=onnx.TensorProto.INT8)]
    dequantize.input[0] = name
    if len(dequantize.input) > 2:
        del dequantize.input[2]  # zero, and of the wrong type now
    return []


def _partly_packed(graph: Graph, dequantize: onnx.NodeProto, narrow: NDArray[np.bool_]) -> list[onnx.NodeProto]:
    """Let a DequantizeLinear take these channels from packed weights; returns the nodes that must go before it."""
    name = dequantize.input[0]
    integers = graph.array(name)
    four, eight, order, cast, joined, whole = (
        f"{name}/{part}" for part in ("int4", "rest", "order", "int8", "joined", "whole")
    )
    # where each channel lies once the narrow ones come first
    places = np.argsort(np.argsort(~narrow, kind="stable"), kind="stable").astype(np.int32)
    graph.add(four, _as_int4(integers[narrow]))
    graph.add(eight, integers[~narrow])
    graph.add(order, places)
    dequantize.input[0] = whole
    return [
        helper.make_node("Cast", [four], [cast], name=f"{four}/Cast", to=onnx.TensorProto.INT8),
        helper.make_node("Concat", [cast, eight], [joined], name=f"{four}/Concat", axis=0),
        helper.make_node("Gather", [joined, order], [whole], name=f"{four}/Gather", axis=0),
    ]


def _as_int4(integers: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.asarray(integers.astype(ml_dtypes.int4))
