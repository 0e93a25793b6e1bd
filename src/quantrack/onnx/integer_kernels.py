"""Rewrite what ONNX Runtime's integer kernels are slow at, without changing a single value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quantrack.onnx.channels_last_head import keep_channels_last
from quantrack.onnx.graph import Graph

# the same on a grid's integers
COMPARING = frozenset({"Reshape", "Transpose", "Concat", "GatherElements", "ReduceMax"})
SEVEN_BITS = (-64, 63)
CHANNEL_MULTIPLE = 4  # the convolution kernel reads four input channels at a time; other counts go through im2col


def suit_integer_kernels(graph: Graph) -> None:
    """Fill the picture's channels up to four with zeros, double sides by copying, select on integers, channels last.

    And give large weights zero points of their own, which processors without VNNI want.
    """
    fill_input_channels(graph)
    double_by_copying(graph)
    dequantize_late(graph)
    keep_channels_last(graph)
    own_zero_points(graph)


def own_zero_points(graph: Graph) -> None:
    """Let no two weights beyond 7 bits share a zero point.

    For exact sums on processors without VNNI, ONNX Runtime (`session.x64quantprecision`) makes such weights and
    their zero points unsigned, under new names, and refuses the file as it meets a name again.
    """
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in graph.initializers:
            continue
        weights, zero_point = graph.array(node.input[0]), node.input[2]
        if weights.dtype != np.int8 or not (weights != weights.clip(*SEVEN_BITS)).any():
            continue
        if zero_point in taken:
            node.input[2] = graph.add(f"{node.input[0]}/zero_point", graph.array(zero_point))
        taken.add(zero_point)


def take_wholes(graph: Graph) -> None:
    """Let a Concat that takes all slices of a tensor in order take the tensor itself.

    In channels-last order each slice is copied position by position, a few bytes at a time. Called before
    there are quantizers between the two.
    """
    shapes = graph.shapes()
    replaced: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "Concat":
            wholes = _wholes(graph, node, shapes)
            replaced |= set(node.input) - set(wholes)
            node.input[:] = wholes
    used = {name for node in graph.nodes for name in node.input} | graph.outputs
    graph.replace([node for node in graph.nodes if node.output[0] in used or node.output[0] not in replaced])


def _wholes(graph: Graph, concat: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> list[str]:
    """A Concat's inputs, each run of slices that make up a tensor replaced by it."""
    axis = next(item.i for item in concat.attribute if item.name == "axis")
    waiting, found = list(concat.input), []
    while waiting:
        parts = [_sliced(graph, name, axis) for name in waiting]
        whole = parts[0].whole if parts[0] is not None else ""
        end = count = 0
        for part in parts:
            if part is None or part.whole != whole or part.start != end:
                break
            end, count = part.end, count + 1
        complete = count > 1 and [end] == shapes.get(whole, [])[axis : axis + 1]
        found.append(whole if complete else waiting[0])
        del waiting[: count if complete else 1]
    return found


@dataclass(frozen=True)
class Sliced:
    """A part of a tensor along one axis, from `start` to before `end`."""

    whole: str
    start: int
    end: int


def _sliced(graph: Graph, tensor: str, axis: int) -> Sliced | None:
    """What a tensor is a slice of, along this axis in steps of one; None if it is no such slice."""
    node = graph.producers.get(tensor)
    if node is None or node.op_type != "Slice" or not all(name in graph.initializers for name in node.input[1:]):
        return None
    start, end, *along = (graph.array(name).tolist() for name in node.input[1:])
    return Sliced(node.input[0], start[0], end[0]) if along in ([[axis]], [[axis], [1]]) else None


@dataclass(frozen=True)
class Dequantized:
    """What a DequantizeLinear reads: a tensor of integers, and the names of scale and zero point."""

    integers: str
    grid: tuple[str, ...]


def dequantize_late(graph: Graph) -> None:
    """Let what only moves or compares values work on integers, where they become float after it anyway.

    Of a head's 8,400 positions 300 are selected; those alone are then dequantized.
    """
    known = {
        node.output[0]: Dequantized(node.input[0], tuple(node.input[1:]))
        for node in graph.nodes
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.producers
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        nodes.append(node)
        values = _values_on_one_grid(node, known)
        result = node.output[0]
        if values and not any(reader.op_type == "QuantizeLinear" for reader in graph.consumers[result]):
            node.output[0] = f"{result}/integers"
            node.input[: len(values)] = [value.integers for value in values]
            known[result] = Dequantized(node.output[0], values[0].grid)
            nodes.append(helper.make_node("DequantizeLinear", [node.output[0], *values[0].grid], [result]))
    used = {name for node in nodes for name in node.input} | graph.outputs
    graph.replace([node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in used])


def _values_on_one_grid(node: onnx.NodeProto, known: Mapping[str, Dequantized]) -> list[Dequantized]:
    """What an operator moves or compares, if all of it comes dequantized from one grid; else nothing."""
    if node.op_type not in COMPARING:
        return []
    names = node.input if node.op_type == "Concat" else node.input[:1]
    values = [known[name] for name in names if name in known]
    return values if len(values) == len(names) and len({value.grid for value in values}) == 1 else []


def fill_input_channels(graph: Graph) -> None:
    """Give the convolution that reads the quantized picture a fourth channel of zeros, weights and input."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        quantize = _picture_quantizer(graph, node)
        if quantize is not None:
            nodes += _filled(graph, node, quantize)
        nodes.append(node)
    graph.replace(nodes)


def _picture_quantizer(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The QuantizeLinear of the graph's input, where a dense integer convolution alone reads it."""
    inputs = {item.name for item in graph.model.graph.input}
    dequantize = graph.producers.get(node.input[0]) if node.op_type == "Conv" else None
    quantize = graph.producers.get(dequantize.input[0]) if dequantize is not None else None
    weights = graph.producers.get(node.input[1]) if quantize is not None else None
    if quantize is None or weights is None or quantize.input[0] not in inputs:
        return None
    channels = graph.array(weights.input[0]).shape[1]
    alone = all(len(graph.consumers[each]) == 1 for each in (*weights.output, *node.input[:1]))
    groups = next((item.i for item in node.attribute if item.name == "group"), 1)
    return quantize if alone and groups == 1 and channels % CHANNEL_MULTIPLE else None


def _filled(graph: Graph, convolution: onnx.NodeProto, quantize: onnx.NodeProto) -> list[onnx.NodeProto]:
    weights = graph.producers[convolution.input[1]]
    integers = graph.array(weights.input[0])
    missing = -integers.shape[1] % CHANNEL_MULTIPLE
    picture = next(item for item in graph.model.graph.input if item.name == quantize.input[0])
    sides = [dimension.dim_value for dimension in picture.type.tensor_type.shape.dim]
    grid = list(quantize.input[1:])
    name = f"{picture.name}/filled"
    shape = graph.add(f"{name}/shape", np.array([sides[0], missing, *sides[2:]], np.int64))
    zero = numpy_helper.from_array(graph.array(grid[1]).reshape(1))
    padding = [(0, 0), (0, missing), (0, 0), (0, 0)]
    weights.input[0] = graph.add(f"{weights.input[0]}/filled", np.pad(integers, padding))
    nodes = [
        helper.make_node("ConstantOfShape", [shape], [f"{name}/zeros"], value=zero),
        helper.make_node("DequantizeLinear", [f"{name}/zeros", *grid], [f"{name}/padding"]),
        helper.make_node("Concat", [convolution.input[0], f"{name}/padding"], [name], name=f"{name}/Concat", axis=1),
        helper.make_node("QuantizeLinear", [name, *grid], [f"{name}/quantized"]),
        helper.make_node("DequantizeLinear", [f"{name}/quantized", *grid], [f"{name}/dequantized"]),
    ]
    convolution.input[0] = f"{name}/dequantized"
    return nodes


def double_by_copying(graph: Graph) -> None:
    """Write nearest-neighbour Resize by two as copies of rows in channels-last order, a third of its time."""
    shapes = graph.shapes()
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        dequantize = graph.producers.get(node.input[0])
        if _doubles(graph, node) and dequantize is not None and dequantize.op_type == "DequantizeLinear":
            nodes += _copies(graph, node, list(dequantize.input[1:]), shapes[node.input[0]])
        else:
            nodes.append(node)
    graph.replace(nodes)


def _doubles(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether this is Resize by [1, 1, 2, 2] to the nearest neighbour, each value four times."""
    if node.op_type != "Resize" or len(node.input) != 3 or node.input[2] not in graph.initializers:
        return False
    settings = {item.name: item.s.decode() for item in node.attribute if item.type == onnx.AttributeProto.STRING}
    plain = settings.get("mode") == "nearest" and settings.get("coordinate_transformation_mode") == "asymmetric"
    return plain and settings.get("nearest_mode") == "floor" and graph.array(node.input[2]).tolist() == [1, 1, 2, 2]


def _copies(graph: Graph, resize: onnx.NodeProto, grid: list[str], shape: list[int]) -> list[onnx.NodeProto]:
    """[1, C, H, W] to [1, C, 2H, 2W] by way of [1, 2H, 2W, C]; Q/DQ between the steps keep them on integers."""
    batch, channels, height, width = shape
    name = resize.name
    apart = graph.add(f"{name}/apart", np.array([batch, height, 1, width, 1, channels], np.int64))
    together = graph.add(f"{name}/together", np.array([batch, 2 * height, 2 * width, channels], np.int64))
    steps: tuple[tuple[str, list[str], dict[str, Any]], ...] = (
        ("Transpose", [], {"perm": [0, 2, 3, 1]}),
        ("Reshape", [apart], {}),
        ("Concat", ["itself"], {"axis": 4}),
        ("Concat", ["itself"], {"axis": 2}),
        ("Reshape", [together], {}),
    )
    nodes: list[onnx.NodeProto] = []
    current = resize.input[0]
    for number, (operator, further, attributes) in enumerate(steps):
        result = f"{name}/{number}"
        inputs = [current, *(current if item == "itself" else item for item in further)]
        nodes += [
            helper.make_node(operator, inputs, [result], name=f"{result}/{operator}", **attributes),
            helper.make_node("QuantizeLinear", [result, *grid], [f"{result}/quantized"]),
            helper.make_node("DequantizeLinear", [f"{result}/quantized", *grid], [f"{result}/dequantized"]),
        ]
        current = f"{result}/dequantized"
    last = helper.make_node("Transpose", [current], list(resize.output), name=f"{name}/Transpose", perm=[0, 3, 1, 2])
    return [*nodes, last]
