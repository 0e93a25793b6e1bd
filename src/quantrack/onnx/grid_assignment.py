"""Which grid each activation of a fully placed file gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from quantrack.onnx.activation_grid import SCORES_FROM, SILU_FROM, Grid, ObservedRange, covering
from quantrack.onnx.float_silu import SILU, silu_product
from quantrack.onnx.graph import Graph

ALIGN_SHARE = 0.5
SAME_GRID = frozenset({"MaxPool", "Resize", "Slice", "Split"})  # they move values and change none
RESHAPING = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
MOVING = SAME_GRID | RESHAPING | {"Concat", "Gather", "GatherElements", "TopK"}


@dataclass(frozen=True)
class ConvInput:
    """What a convolution reads, and the grid that it was calibrated with."""

    tensor: str
    grid: Grid


def assign_grids(
    graph: Graph,
    tensors: set[str],
    conv_inputs: Mapping[str, ConvInput],
    observed: Mapping[str, ObservedRange],
) -> dict[str, Grid]:
    """A grid for every tensor; tensors that hold the same values share one.

    An operand of Concat takes over the result's grid where its own range is at least `ALIGN_SHARE` of it.
    Values are then copied; other operands keep their finer grid and are requantized.
    """
    groups = Groups(tensors)
    for node in graph.nodes:
        if node.op_type in SAME_GRID:
            for output in node.output:
                groups.join(node.input[0], output)
    order = {output: place for place, node in enumerate(graph.nodes, 1) for output in node.output}
    order |= {item.name: 0 for item in graph.model.graph.input}
    calibrated: dict[str, Grid] = {}
    for conv_input in conv_inputs.values():
        root = groups.root(conv_input.tensor)
        known = calibrated.get(root)
        calibrated[root] = conv_input.grid if known is None else covering(known, conv_input.grid)
    by_root: dict[str, Grid] = {}
    # backwards, as what SiLU takes need not reach further than what it gives
    for root, members in sorted(groups, key=lambda group: -max(order[name] for name in group[1])):
        by_root[root] = calibrated.get(root) or _observed_grid(graph, members, observed, groups, by_root)
    _align_concatenations(graph, groups, by_root)
    _align_outputs(graph, groups, by_root)
    return {tensor: by_root[groups.root(tensor)] for tensor in tensors}


def _align_concatenations(graph: Graph, groups: Groups, by_root: dict[str, Grid]) -> None:
    """Join operands of Concat to its result where that costs them less than a bit."""
    for node in graph.nodes:
        result = node.output[0]
        if node.op_type != "Concat" or result not in groups:
            continue
        for operand in filter(groups.__contains__, node.input):  # others stay float
            own, whole = by_root[groups.root(operand)], by_root[groups.root(result)]
            together = covering(own, whole)
            from_relu = any(_is_relu(graph, name) for name in (*groups.of(operand), *groups.of(result)))
            if own.width >= ALIGN_SHARE * whole.width and not (together.zero_point and from_relu):
                root = groups.join(operand, result)
                by_root[root] = together


def _is_relu(graph: Graph, tensor: str) -> bool:
    """Whether a Relu makes a tensor, which runtimes compute with its convolution only on a grid from zero up."""
    return tensor in graph.producers and graph.producers[tensor].op_type == "Relu"


def _align_outputs(graph: Graph, groups: Groups, by_root: dict[str, Grid]) -> None:
    """Give the head's levels one grid where float operators concatenate them, so that integers can be.

    All of them or none: with a level left out nothing is gained.
    """
    for node in graph.nodes:
        sources = [_unmoved(graph, name) for name in node.input] if node.op_type == "Concat" else []
        if not sources or node.output[0] in groups or not all(source in groups for source in sources):
            continue
        own = [by_root[groups.root(source)] for source in sources]
        whole = reduce(covering, own)
        if all(grid.width >= ALIGN_SHARE * whole.width for grid in own):
            for source in sources:
                by_root[groups.join(source, sources[0])] = whole


def _unmoved(graph: Graph, tensor: str) -> str:
    """The tensor that this one is a reshaped view of, or it itself."""
    node = graph.producers.get(tensor)
    return _unmoved(graph, node.input[0]) if node is not None and node.op_type in RESHAPING else tensor


def _observed_grid(
    graph: Graph,
    members: Sequence[str],
    observed: Mapping[str, ObservedRange],
    groups: Groups,
    by_root: Mapping[str, Grid],
) -> Grid:
    """The grid of tensors that no calibrated convolution reads: their observed range, where all of it matters.

    What only SiLU takes is cut below, where SiLU is flat, and above, where its result is cut; scores are
    cut where they are no detections. On YOLOv10n that halves what full placement costs.
    """
    if any(graph.producers[name].op_type == "Sigmoid" for name in members if name in graph.producers):
        return Grid.over(0.0, 1.0)
    low = min(observed[name].minimum for name in members if name in observed)
    high = max(observed[name].maximum for name in members if name in observed)
    results = {result for name in members if (result := _silu_result(graph, name))}
    if len(results) == 1 and len(members) == 1:
        result = results.pop()
        known = by_root.get(groups.root(result)) if result in groups else None
        return Grid.over(max(low, SILU_FROM), min(high, known.high) if known else high)
    if any(_feeds_sigmoid(graph, name) for name in members):
        low = max(low, SCORES_FROM)
    return Grid.over(low, high)


def _silu_result(graph: Graph, tensor: str) -> str:
    """SiLU of this tensor, if that is all that it is for; else nothing."""
    consumers = graph.consumers[tensor]
    merged = len(consumers) == 1 and consumers[0].op_type == SILU
    node = consumers[0] if merged else silu_product(graph, tensor)
    return node.output[0] if node is not None else ""


def _feeds_sigmoid(graph: Graph, tensor: str) -> bool:
    """Whether its values are moved to a sigmoid and nothing else is computed from them on that way."""
    moved = [output for node in graph.consumers[tensor] if node.op_type in MOVING for output in node.output]
    direct = any(node.op_type == "Sigmoid" for node in graph.consumers[tensor])
    return direct or any(_feeds_sigmoid(graph, output) for output in moved)


class Groups:
    """Tensors in groups that can be joined (union-find); iterating gives each root with its members."""

    def __init__(self, tensors: Iterable[str]) -> None:
        self._parent = {tensor: tensor for tensor in tensors}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._parent

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        members: dict[str, list[str]] = {}
        for tensor in sorted(self._parent):
            members.setdefault(self.root(tensor), []).append(tensor)
        return iter(members.items())

    def of(self, tensor: str) -> list[str]:
        """The tensors of a tensor's group, itself among them."""
        return [other for other in self._parent if self.root(other) == self.root(tensor)]

    def root(self, tensor: str) -> str:
        """The tensor that stands for a tensor's group."""
        while self._parent[tensor] != tensor:
            tensor = self._parent[tensor]
        return tensor

    def join(self, one: str, other: str) -> str:
        """Make one group of two; returns its root. Tensors that are in no group are left alone."""
        if one in self._parent and other in self._parent:
            self._parent[self.root(one)] = self.root(other)
        return self.root(other) if other in self._parent else one
