"""Quantizers at every activation, so that ONNX Runtime fuses them into integer kernels.

With quantizers at the convolutions' inputs alone, ONNX Runtime's CPU provider computes in float and the
Q/DQ nodes are pure cost. It runs an operator on integers where all its inputs come from DequantizeLinear
and its output goes to QuantizeLinear (QLinearConv, QLinearSigmoid, QLinearMul, QLinearAdd, QLinearConcat;
MaxPool, Slice and Split as they are), and a convolution only with an INT32 bias of scale x scale. So
every activation on the way to a convolution gets a quantizer of its own, and the head's outputs do;
attention and the head's decoding stay float, and so does SiLU where that is faster (see `float_silu`).

The convolutions' inputs keep the scale and zero point that they were calibrated with, or get coarser
ones where several convolutions or a Concat share a grid. All activations are unsigned: ONNX Runtime's
x86 kernels for signed ones are twenty times slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from quantrack.errors import QuantrackError
from quantrack.onnx.activation_grid import Grid, ObservedRange
from quantrack.onnx.float_silu import SILU, silu_in_float
from quantrack.onnx.graph import Graph, read_graph, write_graph
from quantrack.onnx.grid_assignment import SAME_GRID, ConvInput, assign_grids
from quantrack.onnx.integer_kernels import suit_integer_kernels, take_wholes

BETWEEN_QUANTIZERS = frozenset({SILU, "Sigmoid", "Mul", "Add", "Concat", "MaxPool", "Resize", "Slice", "Split"})
LARGEST_BIAS = 2**30  # of the 2**31 that the accumulator holds, so that it holds the products as well


def observable_tensors(path: Path) -> tuple[str, ...]:
    """The tensors of a QCDQ file whose values `place_everywhere` wants to know."""
    graph = read_graph(path)
    grids = strip_activation_quantizers(graph)
    rewrite_unquantized(graph)
    produced = set(graph.producers)
    return tuple(sorted(tensors_to_quantize(graph, grids) & produced))


def place_everywhere(source: Path, target: Path, observed: Mapping[str, ObservedRange]) -> None:
    """Write a copy of a cleaned QCDQ file with quantizers at every activation.

    `observed` has the values of `observable_tensors(source)` over the calibration pictures.

    Raises:
        QuantrackError: the file has no quantized activations, or signed ones.
    """
    graph = read_graph(source)
    conv_grids = strip_activation_quantizers(graph)
    if not conv_grids:
        raise QuantrackError(f"{source}: no activation is quantized; full placement needs a W4A8 or W8A8 model")
    graph.give_own_constants()
    rewrite_unquantized(graph)
    tensors = tensors_to_quantize(graph, conv_grids)
    grids = assign_grids(graph, tensors, conv_grids, observed)
    insert_everywhere(graph, grids, conv_grids)
    suit_integer_kernels(graph)
    write_graph(graph, target)


def rewrite_unquantized(graph: Graph) -> None:
    """Rewrite what must be before there are quantizers in between."""
    take_wholes(graph)
    silu_in_float(graph)


def strip_activation_quantizers(graph: Graph) -> dict[str, ConvInput]:
    """Take the Q/DQ pairs at convolutions' inputs out of the graph; returns them by convolution's name."""
    found: dict[str, ConvInput] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        dequantize = graph.producers.get(node.input[0]) if node.op_type == "Conv" else None
        quantize = graph.producers.get(dequantize.input[0]) if dequantize is not None else None
        if dequantize is None or quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        zero_point = graph.array(quantize.input[2])
        if zero_point.dtype != np.uint8:
            raise QuantrackError(
                f"{node.name}: signed activations; full placement needs asymmetric ones (every recipe but naive)"
            )
        if zero_point.size > 1:
            raise QuantrackError(
                f"{node.name}: one scale a channel; full placement needs a recipe without channel_equalization"
            )
        grid = Grid(float(graph.array(quantize.input[1])), int(zero_point))
        found[node.name] = ConvInput(quantize.input[0], grid)
        node.input[0] = quantize.input[0]
        gone |= {*quantize.output, *dequantize.output}
    graph.replace([node for node in graph.nodes if node.output[0] not in gone])
    return found


def tensors_to_quantize(graph: Graph, conv_inputs: Mapping[str, ConvInput]) -> set[str]:
    """Every activation that these operators take or give, on the way to a quantized convolution or out of one."""
    upstream = _upstream(graph, [conv_input.tensor for conv_input in conv_inputs.values()])
    chosen = {conv_input.tensor for conv_input in conv_inputs.values()}
    on_integers = {item.name for item in graph.model.graph.input}
    for node in graph.nodes:
        if node.op_type == "Conv" and node.name in conv_inputs:
            on_integers.update(graph.activated(output) for output in node.output)
        elif node.op_type in BETWEEN_QUANTIZERS and node.output[0] in upstream and on_integers & set(node.input):
            activations = [name for name in node.input if name not in graph.initializers and name]
            # a product with a constant, as in attention, has no integer kernel without quantizing the constant
            if node.op_type in SAME_GRID or len(activations) == len(node.input):
                on_integers.update(node.output)
                chosen.update(activations)
    return chosen | (on_integers & set(graph.producers))


def _upstream(graph: Graph, tensors: Iterable[str]) -> set[str]:
    """Every tensor that these depend on, themselves among them."""
    found: set[str] = set()
    waiting = list(tensors)
    while waiting:
        name = waiting.pop()
        node = graph.producers.get(name)
        if name not in found and node is not None:
            found.update(node.output)
            waiting.extend(node.input)
    return found


def insert_everywhere(graph: Graph, grids: Mapping[str, Grid], conv_inputs: Mapping[str, ConvInput]) -> None:
    """A Q/DQ pair after every tensor that has a grid, and INT32 biases."""
    nodes: list[onnx.NodeProto] = []
    read_as: dict[str, str] = {}
    constants = {
        grid: _grid_constants(graph, number, grid) for number, grid in enumerate(dict.fromkeys(grids.values()))
    }

    def quantize(tensor: str) -> None:
        pair = quantizer_pair(tensor, constants[grids[tensor]], len(read_as))
        read_as[tensor] = pair[-1].output[0]
        nodes.extend(pair)

    for image in graph.model.graph.input:
        if image.name in grids:
            quantize(image.name)
    for node in graph.nodes:
        if node.op_type == "Conv" and node.name in conv_inputs and len(node.input) > 2:
            nodes.append(_integer_bias(graph, node, grids[node.input[0]]))
        for place, name in enumerate(node.input):
            node.input[place] = read_as.get(name, name)
        nodes.append(node)
        for output in node.output:
            if output in grids:
                quantize(output)
    graph.replace(nodes)


def _grid_constants(graph: Graph, number: int, grid: Grid) -> list[str]:
    """Names of a grid's scale and zero point; short ones, as names are a tenth of a 4-bit file."""
    return [graph.add(f"grid{number}/{name}", value) for name, value in grid.constants().items()]


def quantizer_pair(tensor: str, constants: Sequence[str], number: int) -> list[onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear of a tensor, by scale and zero point."""
    integers, result = f"q{number}", f"dq{number}"
    return [
        helper.make_node("QuantizeLinear", [tensor, *constants], [integers]),
        helper.make_node("DequantizeLinear", [integers, *constants], [result]),
    ]


def _integer_bias(graph: Graph, convolution: onnx.NodeProto, grid: Grid) -> onnx.NodeProto:
    """The bias as INT32 on the accumulator's grid, input scale x weight scale, as QLinearConv wants it."""
    dequantize, input_scale = graph.producers[convolution.input[1]], np.float64(np.float32(grid.scale))
    bias = graph.array(convolution.input[2]).astype(np.float64)
    raise_weight_scales(graph, dequantize, np.abs(bias) / (input_scale * LARGEST_BIAS))
    scale: NDArray[np.float64] = input_scale * graph.array(dequantize.input[1]).astype(np.float64).reshape(-1)
    integers = np.rint(bias / scale).astype(np.int32)
    prefix = f"bias{len(graph.initializers)}"
    result = f"{prefix}/dequantized"
    constants = [
        graph.add(f"{prefix}/integers", integers),
        graph.add(f"{prefix}/scale", np.broadcast_to(scale, integers.shape).astype(np.float32)),
        graph.add(f"{prefix}/zero_point", np.zeros(integers.shape, np.int32)),
    ]
    convolution.input[2] = result
    return helper.make_node("DequantizeLinear", constants, [result], axis=0)


def raise_weight_scales(graph: Graph, dequantize: onnx.NodeProto, least: NDArray[np.float64]) -> None:
    """Let no output channel's weight scale be below `least` [O]: its bias would not fit into an integer.

    Only a channel that is all but dead has such a scale. Next to its bias, what its weights lose is nothing.
    """
    scale = graph.array(dequantize.input[1]).astype(np.float64).reshape(-1)
    if (scale >= least).all():
        return
    integers = graph.array(dequantize.input[0])
    raised = np.maximum(scale, least).astype(np.float32)
    factors = (scale / raised).reshape(-1, *(1,) * (integers.ndim - 1))
    for place, value in enumerate((np.rint(integers.astype(np.float64) * factors).astype(integers.dtype), raised)):
        dequantize.input[place] = graph.add(f"{dequantize.input[place]}/raised", value)
