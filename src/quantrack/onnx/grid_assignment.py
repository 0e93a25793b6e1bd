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
    """A grid for every tensor, in four steps.

    1. Tensors that hold the same values form a group, which has one grid.
    2. What calibrated convolutions read has their grid; the one that covers theirs where several read it.
    3. All others have the range that was observed, where all of it matters (`_observed_grid`).
    4. Operands of a Concat take over the result's grid where their own range is at least `ALIGN_SHARE` of it: values
       are then copied; other operands keep their finer grid and are requantized. So do the head's levels.
    """
    groups = Groups(tensors)
    for node in graph.nodes:
        if node.op_type in SAME_GRID:
            for output in node.output:
                groups.join(node.input[0], output)
    for conv_input in conv_inputs.values():
        known = groups.grid(conv_input.tensor)
        groups.set_grid(conv_input.tensor, covering(known, conv_input.grid) if known else conv_input.grid)
    _take_observed(graph, groups, observed)
    _align_concatenations(graph, groups)
    _align_outputs(graph, groups)
    return groups.grids()


def _take_observed(graph: Graph, groups: Groups, observed: Mapping[str, ObservedRange]) -> None:
    """Give each group without a grid its own, backwards: what SiLU takes need not reach further than what it gives."""
    order = {output: place for place, node in enumerate(graph.nodes, 1) for output in node.output}
    order |= {item.name: 0 for item in graph.model.graph.input}
    for members in sorted(groups, key=lambda members: -max(order[name] for name in members)):
        if groups.grid(members[0]) is None:
            groups.set_grid(members[0], _observed_grid(graph, members, observed, groups))


def _align_concatenations(graph: Graph, groups: Groups) -> None:
    """Join operands of Concat to its result where that costs them less than a bit."""
    for node in graph.nodes:
        result = node.output[0]
        if node.op_type != "Concat" or result not in groups:
            continue
        for operand in filter(groups.__contains__, node.input):  # others stay float
            own, whole = groups.known_grid(operand), groups.known_grid(result)
            together = covering(own, whole)
            from_relu = any(_is_relu(graph, name) for name in (*groups.of(operand), *groups.of(result)))
            if own.width >= ALIGN_SHARE * whole.width and not (together.zero_point and from_relu):
                groups.join(operand, result)
                groups.set_grid(result, together)


def _is_relu(graph: Graph, tensor: str) -> bool:
    """Whether a Relu makes a tensor, which runtimes compute with its convolution only on a grid from zero up."""
    return tensor in graph.producers and graph.producers[tensor].op_type == "Relu"


def _align_outputs(graph: Graph, groups: Groups) -> None:
    """Give the head's levels one grid where float operators concatenate them, so that integers can be.

    All of them or none: with a level left out nothing is gained.
    """
    for node in graph.nodes:
        sources = [_unmoved(graph, name) for name in node.input] if node.op_type == "Concat" else []
        if not sources or node.output[0] in groups or not all(source in groups for source in sources):
            continue
        own = [groups.known_grid(source) for source in sources]
        whole = reduce(covering, own)
        if all(grid.width >= ALIGN_SHARE * whole.width for grid in own):
            for source in sources:
                groups.join(source, sources[0])
            groups.set_grid(sources[0], whole)


def _unmoved(graph: Graph, tensor: str) -> str:
    """The tensor that this one is a reshaped view of, or it itself."""
    node = graph.producers.get(tensor)
    return _unmoved(graph, node.input[0]) if node is not None and node.op_type in RESHAPING else tensor


def _observed_grid(
    graph: Graph,
    members: Sequence[str],
    observed: Mapping[str, ObservedRange],
    groups: Groups,
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
        known = groups.grid(result) if result in groups else None
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
    """Tensors in groups that can be joined (union-find), each with a grid once it has been given one.

    Iterating gives the members of each group.
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        self._parent = {tensor: tensor for tensor in sorted(tensors)}  # the same order in every process
        self._grids: dict[str, Grid] = {}  # by root

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._parent

    def __iter__(self) -> Iterator[list[str]]:
        members: dict[str, list[str]] = {}
        for tensor in self._parent:
            members.setdefault(self._root(tensor), []).append(tensor)
        return iter(members.values())

    def of(self, tensor: str) -> list[str]:
        """The tensors of a tensor's group, itself among them."""
        return [other for other in self._parent if self._root(other) == self._root(tensor)]

    def join(self, one: str, other: str) -> None:
        """Make one group of two, with the grid of the second's. Tensors that are in no group are left alone."""
        if one in self._parent and other in self._parent and self._root(one) != self._root(other):
            self._grids.pop(self._root(one), None)
            self._parent[self._root(one)] = self._root(other)

    def grid(self, tensor: str) -> Grid | None:
        """The grid of a tensor's group; None where it has none yet."""
        return self._grids.get(self._root(tensor))

    def known_grid(self, tensor: str) -> Grid:
        """The grid of a tensor's group, which has one."""
        return self._grids[self._root(tensor)]

    def set_grid(self, tensor: str, grid: Grid) -> None:
        """Give a tensor's group this grid in the place of the one that it has, if any."""
        self._grids[self._root(tensor)] = grid

    def grids(self) -> dict[str, Grid]:
        """The grid of every tensor."""
        return {tensor: self.known_grid(tensor) for tensor in self._parent}

    def _root(self, tensor: str) -> str:
        """The tensor that stands for a tensor's group."""
        while self._parent[tensor] != tensor:
            tensor = self._parent[tensor]
        return tensor
