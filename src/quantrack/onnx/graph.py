"""A graph that can be looked through and rewritten: who makes a tensor, who takes it, what is constant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from quantrack.files import atomic_path
from quantrack.onnx.inspect import load_onnx


class Graph:
    """An ONNX model's graph and its indices, which `replace` makes anew; nodes may be changed in place before it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._index()

    def _index(self) -> None:
        graph = self.model.graph
        self.initializers = {item.name: item for item in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.consumers[name].append(node)

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes in order."""
        return list(self.model.graph.node)

    @property
    def outputs(self) -> set[str]:
        """The names of the graph's results."""
        return {item.name for item in self.model.graph.output}

    def array(self, name: str) -> NDArray[np.generic]:
        """The value of an initializer."""
        return np.asarray(numpy_helper.to_array(self.initializers[name]))

    def shapes(self) -> dict[str, list[int]]:
        """The sides of the tensors inside the graph whose rank can be inferred; 0 for one that is not fixed."""
        bare = onnx.ModelProto()
        bare.CopyFrom(self.model)
        del bare.graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(bare).graph.value_info
        known = [item for item in inferred if item.type.tensor_type.HasField("shape")]
        return {item.name: [side.dim_value for side in item.type.tensor_type.shape.dim] for item in known}

    def activated(self, tensor: str) -> str:
        """The result of the Relu that alone reads a tensor, else the tensor.

        Runtimes compute a Relu with the convolution before it, on integers as well.
        """
        consumers = self.consumers[tensor]
        return str(consumers[0].output[0]) if [node.op_type for node in consumers] == ["Relu"] else tensor

    def add(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        """Add a constant under a name that is free; returns the name.

        Raises:
            ValueError: the name is taken.
        """
        if name in self.initializers:
            raise ValueError(f"{name}: the graph has a constant of this name")
        tensor = numpy_helper.from_array(np.asarray(value), name)
        self.model.graph.initializer.append(tensor)
        self.initializers[name] = tensor
        return name

    def take_constants_themselves(self) -> None:
        """Remove each Identity of an initializer: of equal constants the exporter keeps one, others are copies."""
        copies = {node.output[0]: node for node in self.nodes if node.op_type == "Identity"}
        copies = {name: node for name, node in copies.items() if node.input[0] in self.initializers}
        for node in self.nodes:
            for place, name in enumerate(node.input):
                if name in copies:
                    node.input[place] = copies[name].input[0]
        self.replace(node for node in self.nodes if node.output[0] not in copies)

    def give_own_constants(self) -> None:
        """Let no two DequantizeLinear share weights or their scales, so that each can be rewritten alone."""
        taken: set[str] = set()
        for node in self.nodes:
            if node.op_type != "DequantizeLinear" or node.input[0] not in self.initializers:
                continue
            for place, name in enumerate(node.input[:2]):
                if name in taken:
                    node.input[place] = self.add(f"{name}/of {node.output[0]}", self.array(name))
                taken.add(name)

    def replace(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Take copies of these nodes instead, and drop constants that none of them uses."""
        kept = list(nodes)
        used = {name for node in kept for name in node.input}
        constants = [item for item in self.model.graph.initializer if item.name in used]
        del self.model.graph.node[:], self.model.graph.initializer[:]
        self.model.graph.node.extend(kept)
        self.model.graph.initializer.extend(constants)
        self._index()


def read_graph(path: Path) -> Graph:
    """The graph of a file.

    Raises:
        QuantrackError: the file is missing or is not ONNX.
    """
    return Graph(load_onnx(path))


def write_graph(graph: Graph, path: Path) -> None:
    """Write the model whole or not at all; shapes of tensors that changed are left to be inferred."""
    del graph.model.graph.value_info[:]
    for node in graph.model.graph.node:
        node.name = node.name or f"{node.output[0]}/{node.op_type}"  # runtimes' errors and profiles go by names
    with atomic_path(path) as temporary:
        onnx.save(graph.model, str(temporary))
