"""Which provider ran which operators and how long they took, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TypedDict

import numpy as np

from quantrack.errors import QuantrackError
from quantrack.runtime.session import CUDA, FULL_NAMES, TENSORRT, Session, open_profiled

PROFILED_RUNS = 10
BIG = 1000  # values of a tensor that is data, not a shape or an index
INTEGER_KERNELS = ("QLinear", "ConvInteger", "MatMulInteger", "QGemm", "DynamicQuantize")
ON_GPU = (FULL_NAMES[CUDA], FULL_NAMES[TENSORRT])
COPIES = ("MemcpyFromHost", "MemcpyToHost")


@dataclass(frozen=True)
class OperatorUse:
    """One operator on one provider: how many nodes, how many of them work on data, milliseconds a picture."""

    operator: str
    provider: str
    nodes: int
    compute_nodes: int
    milliseconds: float


@dataclass(frozen=True)
class Placement:
    """What the optimized graph's nodes ran on, the most time first."""

    uses: tuple[OperatorUse, ...]

    def nodes_by_provider(self) -> dict[str, int]:
        """Nodes by the provider that ran them, for example {'CPUExecutionProvider': 350}."""
        counts: Counter[str] = Counter()
        for use in self.uses:
            counts[use.provider] += use.nodes
        return dict(counts)

    def milliseconds_by_provider(self) -> dict[str, float]:
        """Milliseconds a picture by the provider that spent them."""
        sums: defaultdict[str, float] = defaultdict(float)
        for use in self.uses:
            sums[use.provider] += use.milliseconds
        return dict(sums)

    @property
    def integer_nodes(self) -> int:
        """Nodes that compute on integers; with QCDQ alone there are none."""
        return sum(use.nodes for use in self.uses if use.operator.startswith(INTEGER_KERNELS))

    @property
    def memory_copies(self) -> int:
        """Nodes that copy between host and device."""
        return sum(use.nodes for use in self.uses if use.operator in COPIES)

    def metrics(self) -> dict[str, float]:
        placed = {f"nodes_on_{provider}": float(count) for provider, count in self.nodes_by_provider().items()}
        return placed | {"nodes_int8_compute": float(self.integer_nodes), "nodes_memcpy": float(self.memory_copies)}

    def record(self) -> dict[str, object]:
        """`placement.json`."""
        spent = self.milliseconds_by_provider()
        providers = [
            {"provider": provider, "nodes": nodes, "milliseconds": spent[provider]}
            for provider, nodes in self.nodes_by_provider().items()
        ]
        operators = [asdict(use) for use in self.uses]
        return {"runs": PROFILED_RUNS - 1, "providers": providers, "operators": operators}

    def require_gpu(self) -> None:
        """Check that all data stayed on the GPU.

        Raises:
            QuantrackError: a node that works on data ran elsewhere.
        """
        elsewhere = [use for use in self.uses if use.compute_nodes and use.provider not in ON_GPU]
        if elsewhere:
            listed = ", ".join(f"{use.compute_nodes} {use.operator} on {use.provider}" for use in elsewhere[:3])
            count = sum(use.compute_nodes for use in elsewhere)
            raise QuantrackError(
                f"require_gpu=true: {count} compute nodes did not run on CUDA ({listed}); "
                "use provider=cuda on a machine with a GPU, or require_gpu=false"
            )


class _Arguments(TypedDict, total=False):
    provider: str
    op_name: str
    input_type_shape: list[dict[str, list[int]]]
    output_type_shape: list[dict[str, list[int]]]


class _Event(TypedDict):
    cat: str
    name: str
    dur: int
    args: _Arguments


def measure_placement(session: Session) -> Placement:
    """Profile a few runs of the session's file, on an empty picture."""
    images = np.zeros((1, 3, session.imgsz, session.imgsz), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        profiled = open_profiled(session, Path(folder) / "profile")
        for _ in range(PROFILED_RUNS):
            profiled.run(None, {profiled.get_inputs()[0].name: images})
        events: list[_Event] = json.loads(Path(profiled.end_profiling()).read_text())
    return placement_of(events)


def placement_of(events: Iterable[_Event]) -> Placement:
    """Operators and providers of a profile; a node's runs are averaged, the first left out, which prepares others."""
    durations: defaultdict[str, list[int]] = defaultdict(list)
    nodes: dict[str, _Arguments] = {}
    for event in events:
        if event.get("cat") == "Node" and "provider" in event.get("args", {}):
            durations[event["name"]].append(event["dur"])
            nodes[event["name"]] = event["args"]
    grouped: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, arguments in nodes.items():
        grouped[arguments["op_name"], arguments["provider"]].append(name)
    uses = [
        OperatorUse(
            operator,
            provider,
            len(names),
            sum(_works_on_data(nodes[name]) for name in names),
            sum(mean(durations[name][1:] or durations[name]) for name in names) / 1000,
        )
        for (operator, provider), names in grouped.items()
    ]
    return Placement(tuple(sorted(uses, key=lambda use: -use.milliseconds)))


def _works_on_data(arguments: _Arguments) -> bool:
    tensors: list[Mapping[str, list[int]]] = [
        *arguments.get("input_type_shape", []),
        *arguments.get("output_type_shape", []),
    ]
    return any(math.prod(shape) >= BIG for tensor in tensors for shape in tensor.values())
