"""A selecting head on integers, in the order in which integer convolutions give their results: channels last.

ONNX Runtime's integer convolutions give [1, H, W, C]. Written for [1, C, positions], the head has all 8,400 positions
turned around, and its best class sought a row of memory apart each time. Here the selected ones alone are turned.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from quantrack.onnx.graph import Graph

LAST = "/channels_last"


def keep_channels_last(graph: Graph) -> None:
    """Let a Concat of quantized convolutions' results, and what selects from it, have channels last.

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
            node.input[0] += LAST
            _attribute(node, "axes").ints[:] = [2]
            nodes.append(node)
        elif node.op_type == "GatherElements" and node.input[0] in found:
            nodes += _selected(graph, node)
        else:
            nodes.append(node)
    graph.replace(_needed(graph, nodes))


def _levels(graph: Graph, node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> list[str]:
    """The results [1, C, H, W] that a Concat puts together by position, if all that reads it can be rewritten."""
    if node.op_type != "Concat" or not all(_can_be_rewritten(graph, reader) for reader in _readers(graph, node)):
        return []
    reshapes = [graph.producers.get(name) for name in node.input]
    levels = [reshape.input[0] for reshape in reshapes if reshape is not None and reshape.op_type == "Reshape"]
    quantized = all(level in graph.producers and graph.producers[level].op_type == "QuantizeLinear" for level in levels)
    if len(levels) != len(node.input) or not quantized or _attribute(node, "axis").i not in (-1, 2):
        return []
    sides = [shapes.get(level, []) for level in levels]
    flat = [[1, side[1], side[2] * side[3]] if len(side) == 4 else [] for side in sides]
    return levels if all(shapes.get(name) == each for name, each in zip(node.input, flat, strict=True)) else []


def _readers(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto | None]:
    """What reads a node's result; None for the graph's user."""
    shown = node.output[0] in {item.name for item in graph.model.graph.output}
    return [*graph.consumers[node.output[0]], *([None] if shown else [])]


def _can_be_rewritten(graph: Graph, reader: onnx.NodeProto | None) -> bool:
    if reader is not None and reader.op_type == "ReduceMax":
        axes = [list(item.ints) for item in reader.attribute if item.name == "axes"]
        return len(reader.input) == 1 and axes == [[1]]
    by_position = reader is not None and reader.op_type == "GatherElements" and _attribute(reader, "axis").i == 2
    return by_position and reader is not None and bool(_positions(graph, reader))


def _positions(graph: Graph, selection: onnx.NodeProto) -> str:
    """The positions [1, k] that a GatherElements takes of all channels alike; empty if it is not so."""
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
        turned, flat = f"{result}/{place}/turned", f"{result}/{place}"
        sides = graph.add(f"{flat}/sides", np.array([batch, height * width, channels], np.int64))
        nodes += [
            helper.make_node("Transpose", [level], [turned], name=f"{flat}/Transpose", perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [turned, sides], [flat], name=f"{flat}/Reshape"),
        ]
    parts = [f"{result}/{place}" for place in range(len(levels))]
    return [*nodes, helper.make_node("Concat", parts, [result], name=concat.name, axis=1)]


def _selected(graph: Graph, selection: onnx.NodeProto) -> list[onnx.NodeProto]:
    """[1, C, k] of [1, positions, C]."""
    name = selection.output[0] + LAST
    in_a_row = graph.add(f"{name}/in_a_row", np.array([-1], np.int64))
    return [
        helper.make_node("Reshape", [_positions(graph, selection), in_a_row], [f"{name}/positions"], name=f"{name}/k"),
        helper.make_node("Gather", [selection.input[0] + LAST, f"{name}/positions"], [name], name=name, axis=1),
        helper.make_node("Transpose", [name], list(selection.output), name=selection.name, perm=[0, 2, 1]),
    ]


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    found: onnx.AttributeProto = next(item for item in node.attribute if item.name == name)
    return found


def _needed(graph: Graph, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes without those whose results nothing takes."""
    used = {item.name for item in graph.model.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    return kept[::-1]
