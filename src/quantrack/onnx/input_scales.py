"""Put the scales of equalized channels where they cost nothing: into QuantizeLinear, or on the weights.

A convolution whose channels were equalized is exported with a Mul on its input. Where a QuantizeLinear
follows, the Mul becomes its scale, one a channel (`axis` 1), while the DequantizeLinear keeps one for the
tensor, as integer kernels want it. Where the input stays float, the weights are multiplied instead.

A convolution whose result goes to a QuantizeLinear without an activation in between is multiplied itself, as
ONNX Runtime would make an integer kernel of it, which takes one scale for its result.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from quantrack.onnx.graph import Graph

CHANNELS = 1  # of an activation [B, C, H, W]


def fold_input_scales(graph: Graph) -> int:
    """Remove the Mul by a constant a channel on the way into each convolution; returns how many were removed."""
    graph.take_constants_themselves()
    scalings = [node for node in graph.nodes if is_input_scale(graph, node) and not _has_to_stay(graph, node)]
    multiplied: dict[int, list[onnx.NodeProto]] = {}  # by the convolution that they go before
    for node in scalings:
        factors = graph.array(node.input[1]).astype(np.float32).flatten()
        (consumer,) = graph.consumers[node.output[0]]
        consumer.input[0] = node.input[0]
        source = graph.producers.get(node.input[0])
        if consumer.op_type == "QuantizeLinear" and source is not None and source.op_type == "Conv":
            _multiply_results(graph, source, factors)
        elif consumer.op_type == "QuantizeLinear":
            _scale_each_channel(graph, consumer, factors)
        else:
            multiplied[id(consumer)] = [_multiply_weights(graph, consumer, factors)]
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if not any(node is each for each in scalings):
            nodes += [*multiplied.get(id(node), ()), node]
    graph.replace(nodes)
    return len(scalings)


def is_input_scale(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether this multiplies just one convolution's input, or what is quantized for it, by a constant a channel."""
    if node.op_type != "Mul" or node.input[1] not in graph.initializers or node.input[0] in graph.initializers:
        return False
    factors = graph.array(node.input[1]).astype(np.float32)
    one_each = factors.ndim == 4 and factors.shape[CHANNELS] == factors.size and bool((factors > 0).all())
    return one_each and node.output[0] not in graph.outputs and _leads_to_convolution(graph, node.output[0])


def _leads_to_convolution(graph: Graph, name: str) -> bool:
    """Whether a tensor is just one convolution's input, quantized on the way or not."""
    consumers = graph.consumers[name]
    if len(consumers) != 1:
        return False
    (consumer,) = consumers
    if consumer.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _leads_to_convolution(graph, consumer.output[0])
    return consumer.op_type == "Conv" and consumer.input[0] == name


def _has_to_stay(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether what is multiplied comes from a convolution straight to a quantizer, and cannot be multiplied there."""
    source = graph.producers.get(node.input[0])
    to_quantizer = graph.consumers[node.output[0]][0].op_type == "QuantizeLinear"
    if source is None or source.op_type != "Conv" or not to_quantizer:
        return False
    weights = graph.producers.get(source.input[1])
    own = weights is not None and weights.op_type == "DequantizeLinear" and len(graph.consumers[weights.output[0]]) == 1
    return not own or len(graph.consumers[node.input[0]]) > 1 or node.input[0] in graph.outputs


def _multiply_results(graph: Graph, convolution: onnx.NodeProto, factors: NDArray[np.float32]) -> None:
    """Multiply a convolution's output channels: the scales of its weights, and its bias."""
    dequantize = graph.producers[convolution.input[1]]
    scales = graph.array(dequantize.input[1]).astype(np.float32)
    dequantize.input[1] = graph.add(f"{convolution.name}/scales", (scales.flatten() * factors).astype(np.float32))
    if len(convolution.input) > 2:
        bias = graph.array(convolution.input[2]).astype(np.float32)
        convolution.input[2] = graph.add(f"{convolution.name}/bias", (bias * factors).astype(np.float32))


def _scale_each_channel(graph: Graph, quantize: onnx.NodeProto, factors: NDArray[np.float32]) -> None:
    """Let a QuantizeLinear of one scale quantize what is not multiplied by the factors yet."""
    scale, zero_point = graph.array(quantize.input[1]).astype(np.float32), graph.array(quantize.input[2])
    quantize.input[1] = graph.add(f"{quantize.name}/scales", (scale.reshape(1) / factors).astype(np.float32))
    quantize.input[2] = graph.add(f"{quantize.name}/zero_points", np.full(factors.shape, zero_point.reshape(())))
    quantize.attribute.append(helper.make_attribute("axis", CHANNELS))


def _multiply_weights(graph: Graph, convolution: onnx.NodeProto, factors: NDArray[np.float32]) -> onnx.NodeProto:
    """Let a convolution take weights multiplied by its input's factors; the node that makes them."""
    groups = next((attribute.i for attribute in convolution.attribute if attribute.name == "group"), 1)
    name = f"{convolution.name}/weight"
    columns = factors.reshape(1, -1, 1, 1)
    if groups > 1:
        outputs = len(graph.array(_scale_of_weights(graph, convolution)))
        columns = np.repeat(factors.reshape(groups, -1), outputs // groups, axis=0)[:, :, None, None]
    multiply = helper.make_node(
        "Mul", [convolution.input[1], graph.add(f"{name}/input_scale", columns)], [f"{name}/scaled"], name=f"{name}/Mul"
    )
    convolution.input[1] = multiply.output[0]
    return multiply


def _scale_of_weights(graph: Graph, convolution: onnx.NodeProto) -> str:
    """The scales, one an output channel, of the DequantizeLinear that gives a convolution's weights."""
    scales: str = graph.producers[convolution.input[1]].input[1]
    return scales
