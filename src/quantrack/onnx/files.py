"""Export a detector and clean the graph: the pair of files that every run logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from quantrack.onnx.clean import clean_graph, convert_to_float16
from quantrack.onnx.export import export_float, export_qcdq
from quantrack.onnx.inspect import ModelFacts, check_onnx, count_nodes, node_metrics, write_facts

BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class ExportedFiles:
    """The graph as exported, the cleaned one that is run, and the exported one's node counts."""

    plain: Path
    optimized: Path
    plain_nodes: dict[str, int]
    optimized_nodes: dict[str, int]

    def metrics(self) -> dict[str, float]:
        """Counts of the exported graph and the size of the file that is run, in MB of 10^6 bytes."""
        return node_metrics(self.plain_nodes) | {"onnx_mb": megabytes(self.optimized)}


def file_metrics(path: Path) -> dict[str, float]:
    """Node counts and size of any ONNX file."""
    return node_metrics(count_nodes(path)) | {"onnx_mb": megabytes(path)}


def megabytes(path: Path) -> float:
    """Size of a file in MB of 10^6 bytes."""
    return path.stat().st_size / BYTES_PER_MB


def export_quantized_files(model: nn.Module, facts: ModelFacts, folder: Path) -> ExportedFiles:
    """Write `<model>-<mode>-qcdq-ptq.onnx` and its cleaned `-opt` twin."""
    return _export(model, export_qcdq, facts, folder / f"{facts.model}-{facts.mode}-qcdq-ptq.onnx")


def export_float_files(model: nn.Module, facts: ModelFacts, folder: Path) -> ExportedFiles:
    """Write `<model>-baseline-<precision>.onnx` and its cleaned `-opt` twin."""
    plain = folder / f"{facts.model}-baseline-{facts.mode}.onnx"
    export = export_float if facts.mode == "fp32" else _export_float16
    return _export(model, export, facts, plain)


def _export_float16(model: nn.Module, imgsz: int, path: Path) -> None:
    export_float(model, imgsz, path)
    convert_to_float16(path, path)


def _export(
    model: nn.Module, export: Callable[[nn.Module, int, Path], None], facts: ModelFacts, plain: Path
) -> ExportedFiles:
    optimized = plain.with_name(f"{plain.stem}-opt.onnx")
    export(model, facts.imgsz, plain)
    clean_graph(plain, optimized)
    for path in (plain, optimized):
        write_facts(path, facts)
        check_onnx(path)
    return ExportedFiles(plain, optimized, count_nodes(plain), count_nodes(optimized))
