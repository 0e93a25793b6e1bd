"""A selecting head on integers, in the order in which integer convolutions give their results: channels last.

ONNX Runtime's integer convolutions give [1, H, W, C]. Of a head written for [1, C, positions] it transposes every
level (8,400 positions at 640 px), and the maximum over the classes reads memory with a stride. Here only the positions
that are selected are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from quantrack.onnx.graph import Graph

LAST = "/channels_last"


def keep_channels_last(graph: Graph) -> None:
    """Let a Concat of quantized results [1, C, H, W], and what selects from it by position, have channels last.

    Values and their order in the results stay. Called once the selection is on integers (`dequantize_late`).
    """
    shapes = graph.shapes()
    found = {node.output[0]: levels for node in graph.nodes if (levels := _levels(graph, node, shapes))}
    if not found:
        return
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.output[0] in found:
            nodes += _concatenated(graph, node, found[node.output[0]], shapes)
        elif node.op_type == "ReduceMax" and node.input[0] in found:
            nodes.append(_best(node))
        elif node.op_type == "GatherElements" and node.input[0] in found:
            nodes += _selected(graph, node)
        else:
            nodes.append(node)
    graph.replace(_needed(graph, nodes))


def _levels(graph: Graph, node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> list[str]:
    """The results [1, C, H, W] that a Concat puts together by position, if all that reads it can be rewritten."""
    whole = node.output[0]
    if node.op_type != "Concat" or _settings(node).get("axis") not in (-1, 2):
        return []
    readers = graph.consumers[whole]
    if whole in graph.outputs or not all(_can_be_rewritten(graph, reader, shapes) for reader in readers):
        return []
    reshapes = [graph.producers.get(name) for name in node.input]
    levels = [reshape.input[0] for reshape in reshapes if reshape is not None and reshape.op_type == "Reshape"]
    quantized = all(level in graph.producers and graph.producers[level].op_type == "QuantizeLinear" for level in levels)
    sides = [shapes.get(level, []) for level in levels]
    if len(levels) != len(node.input) or not quantized or not all(len(side) == 4 and all(side) for side in sides):
        return []
    flat = [[1, channels, height * width] for _, channels, height, width in sides]
    return levels if [shapes.get(name) for name in node.input] == flat else []


def _can_be_rewritten(graph: Graph, reader: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> bool:
    """Whether it takes the maximum over all channels, or the same positions of each."""
    settings = _settings(reader)
    if reader.op_type == "ReduceMax":
        return len(reader.input) == 1 and settings.get("axes") == [1] and settings.get("keepdims") == 0
    if reader.op_type != "GatherElements" or settings.get("axis") != 2:
        return False
    batch, channels, *_ = shapes.get(reader.input[0]) or [0, 0]
    positions = shapes.get(_positions(graph, reader), [])
    return len(positions) == 2 and all(positions) and shapes.get(reader.input[1]) == [batch, channels, positions[1]]


def _positions(graph: Graph, selection: onnx.NodeProto) -> str:
    """The positions [1, k] that a GatherElements takes, before they are repeated for each channel; empty if none."""
    expand = graph.producers.get(selection.input[1])
    unsqueeze = graph.producers.get(expand.input[0]) if expand is not None and expand.op_type == "Expand" else None
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or unsqueeze.input[1] not in graph.initializers:
        return ""
    return str(unsqueeze.input[0]) if graph.array(unsqueeze.input[1]).tolist() == [1] else ""


def _concatenated(
    graph: Graph, concat: onnx.NodeProto, levels: list[str], shapes: Mapping[str, list[int]]
) -> list[onnx.NodeProto]:
    """[1, positions, C] of the levels' [1, C, H, W]."""
    nodes: list[onnx.NodeProto] = []
    result = concat.output[0] + LAST
    for place, level in enumerate(levels):
        batch, channels, height, width = shapes[level]
        transposed, flat = f"{result}/{place}/transposed", f"{result}/{place}"
        sides = graph.add(f"{flat}/sides", np.array([batch, height * width, channels], np.int64))
        nodes += [
            helper.make_node("Transpose", [level], [transposed], name=f"{flat}/Transpose", perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [transposed, sides], [flat], name=f"{flat}/Reshape"),
        ]
    parts = [f"{result}/{place}" for place in range(len(levels))]
    return [*nodes, helper.make_node("Concat", parts, [result], name=concat.name, axis=1)]


def _best(maximum: onnx.NodeProto) -> onnx.NodeProto:
    """The maximum over the channels of [1, positions, C]."""
    inputs, name = [maximum.input[0] + LAST], maximum.name
    return helper.make_node("ReduceMax", inputs, list(maximum.output), name=name, axes=[2], keepdims=0)


def _selected(graph: Graph, selection: onnx.NodeProto) -> list[onnx.NodeProto]:
    """[1, C, k] of [1, positions, C]."""
    name = selection.output[0] + LAST
    in_a_row = graph.add(f"{name}/in_a_row", np.array([-1], np.int64))
    return [
        helper.make_node("Reshape", [_positions(graph, selection), in_a_row], [f"{name}/positions"], name=f"{name}/k"),
        helper.make_node("Gather", [selection.input[0] + LAST, f"{name}/positions"], [name], name=name, axis=1),
        helper.make_node("Transpose", [name], list(selection.output), name=selection.name, perm=[0, 2, 1]),
    ]


def _settings(node: onnx.NodeProto) -> dict[str, object]:
    """A node's attributes; one that has its default need not be among them."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _needed(graph: Graph, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes without those whose results nothing takes."""
    used = graph.outputs
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    return kept[::-1]
