"""SiLU in one float operator where that is faster than on integers.

On integers SiLU is a sigmoid by table and a product, one value at a time. ONNX Runtime's `QuickGelu`,
x * sigmoid(alpha * x), computes in float, a vector at a time: mostly faster even with DequantizeLinear
before and QuantizeLinear after it, as long as its float values stay in a core's cache (docs/runtime.md has
the measurements). ONNX Runtime makes it of Sigmoid and Mul by itself, but not where what they read is
dequantized, as each of the two then gets a DequantizeLinear of its own.
"""

from __future__ import annotations

from math import prod

import onnx
from onnx import helper

from quantrack.onnx.graph import Graph

SILU, DOMAIN, DOMAIN_VERSION = "QuickGelu", "com.microsoft", 1
MOST_VALUES = 1 << 18  # 1 MiB of float32, the cache of one core


def silu_in_float(graph: Graph) -> None:
    """Write x * sigmoid(x) of at most `MOST_VALUES` values as one operator.

    The operator is ONNX Runtime's; the file also carries it as a function of ONNX's own operators, for runtimes that
    know functions and not the operator.
    """
    shapes = graph.shapes()
    merged: dict[str, onnx.NodeProto] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        product = silu_product(graph, node.input[0]) if node.op_type == "Sigmoid" else None
        if product is not None and prod(shapes.get(node.output[0], [0])) in range(1, MOST_VALUES + 1):
            result, name = product.output[0], f"{product.name}/{SILU}"
            merged[result] = helper.make_node(SILU, node.input, [result], name=name, domain=DOMAIN, alpha=1.0)
            gone.add(node.output[0])
    if merged:
        graph.replace([merged.get(node.output[0], node) for node in graph.nodes if node.output[0] not in gone])
        _define(graph.model)


def silu_product(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """The node that gives x * sigmoid(x) of this tensor, if that is all that the tensor is for."""
    consumers = graph.consumers[tensor]
    sigmoid = next((node for node in consumers if node.op_type == "Sigmoid"), None)
    product = next((node for node in consumers if node.op_type == "Mul"), None)
    if sigmoid is None or product is None or len(consumers) != 2:
        return None
    gate = sigmoid.output[0]
    alone = len(graph.consumers[gate]) == 1 and gate not in graph.outputs
    return product if alone and gate in product.input else None


def _define(model: onnx.ModelProto) -> None:
    """Import the operator's domain and add its definition, unless they are there."""
    if not any(item.domain == DOMAIN for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    if any((item.domain, item.name) == (DOMAIN, SILU) for item in model.functions):
        return
    alpha = helper.make_node("Constant", [], ["alpha"])
    alpha.attribute.add(name="value_float", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    nodes = [
        alpha,
        helper.make_node("Mul", ["x", "alpha"], ["scaled"]),
        helper.make_node("Sigmoid", ["scaled"], ["gate"]),
        helper.make_node("Mul", ["x", "gate"], ["y"]),
    ]
    opsets = [item for item in model.opset_import if item.domain in ("", "ai.onnx")]
    model.functions.append(helper.make_function(DOMAIN, SILU, ["x"], ["y"], nodes, opsets, ["alpha"]))
