"""What TensorRT's explicit quantization asks of a graph, checked.

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html: quantization is
symmetric, so every zero point is 0; activations have one scale a tensor, weights one a channel; scales
are constants; and a Clip between Q and DQ is not understood.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from quantrack.errors import QuantrackError
from quantrack.onnx.graph import Graph, read_graph


def require_tensorrt_ready(path: Path) -> None:
    """Check a file's Q/DQ nodes.

    Raises:
        QuantrackError: one of them is not as TensorRT wants it.
    """
    graph = read_graph(path)
    for node in graph.nodes:
        problem = _problem(graph, node)
        if problem:
            raise QuantrackError(f"{path}: {node.name or node.op_type}: {problem}; TensorRT would refuse it")


def _problem(graph: Graph, node: onnx.NodeProto) -> str:
    """What is wrong with a node, in a phrase; empty if nothing is."""
    if node.op_type == "Clip":
        before = graph.producers.get(node.input[0])
        integers = node.input[0] in graph.initializers or (before is not None and before.op_type == "QuantizeLinear")
        return "a Clip between Q and DQ" if integers else ""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return ""
    if any(name not in graph.initializers for name in node.input[1:]):
        return "its scale or zero point is no constant"
    if len(node.input) > 2:
        zero_point = graph.array(node.input[2])
        if zero_point.dtype != np.int8 or np.any(zero_point.astype(np.int64) != 0):
            return "its zero point is not a signed 0"
    of_weights = node.input[0] in graph.initializers
    scales = graph.array(node.input[1]).size
    return "" if of_weights or scales == 1 else "activations with more than one scale"
