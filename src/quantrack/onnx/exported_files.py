"""Export a detector and clean the graph: the pair of files that every run logs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from quantrack.onnx.activation_grid import ObservedRange
from quantrack.onnx.clean import clean_graph, convert_to_float16
from quantrack.onnx.export import export_float, export_qcdq
from quantrack.onnx.full_placement import place_everywhere
from quantrack.onnx.inspect import ModelFacts, check_onnx, count_nodes, node_metrics, write_facts
from quantrack.onnx.int4 import store_as_int4
from quantrack.onnx.tensorrt import require_tensorrt_ready

BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class ExportedFiles:
    """The graph as exported, and the one made of it that is run.

    `plain_nodes` counts the graph that states the quantization: the exported one, unless the one that is
    run has other quantizers or other weights.
    """

    plain: Path
    optimized: Path
    plain_nodes: dict[str, int]
    optimized_nodes: dict[str, int]

    def metrics(self) -> dict[str, float]:
        """Node counts, and the size of the file that is run, in MB of 10^6 bytes."""
        return node_metrics(self.plain_nodes) | {"onnx_mb": megabytes(self.optimized)}


def file_metrics(path: Path) -> dict[str, float]:
    """Node counts and size of any ONNX file."""
    return node_metrics(count_nodes(path)) | {"onnx_mb": megabytes(path)}


def megabytes(path: Path) -> float:
    """Size of a file in MB of 10^6 bytes."""
    return path.stat().st_size / BYTES_PER_MB


def export_quantized_files(model: nn.Module, facts: ModelFacts, folder: Path) -> ExportedFiles:
    """Write `<model>-<mode>-qcdq-<method>.onnx` and its cleaned `-opt` twin."""
    return _export(model, export_qcdq, facts, folder / f"{facts.model}-{facts.mode}-qcdq-{facts.method}.onnx")


def place_in_full(files: ExportedFiles, facts: ModelFacts, observed: Mapping[str, ObservedRange]) -> ExportedFiles:
    """Write `<model>-<mode>-qcdq-<method>-full-opt.onnx`, quantizers at every activation, to be run instead."""
    target = _named(files, "full")
    place_everywhere(files.optimized, target, observed)
    return _run_instead(files, target, facts)


def pack_weights(files: ExportedFiles, facts: ModelFacts) -> ExportedFiles:
    """Write the file that is run once more, `-int4-opt.onnx`, with weights of at most 4 bits as INT4."""
    target = _named(files, "int4")
    store_as_int4(files.optimized, target)
    return _run_instead(files, target, facts)


def in_float16(files: ExportedFiles, facts: ModelFacts) -> ExportedFiles:
    """Write the file that is run once more, `-fp16-opt.onnx`, computing in float16 between quantizers."""
    target = _named(files, "fp16")
    convert_to_float16(files.optimized, target)
    return _run_instead(files, target, facts)


def for_tensorrt(files: ExportedFiles, facts: ModelFacts) -> ExportedFiles:
    """Write the file that is run once more, `-tensorrt-opt.onnx`, checked to be as TensorRT wants it."""
    target = _named(files, "tensorrt")
    shutil.copyfile(files.optimized, target)
    require_tensorrt_ready(target)
    return _run_instead(files, target, facts)


def _named(files: ExportedFiles, word: str) -> Path:
    return files.optimized.with_name(f"{files.optimized.stem.removesuffix('-opt')}-{word}-opt.onnx")


def _run_instead(files: ExportedFiles, target: Path, facts: ModelFacts) -> ExportedFiles:
    write_facts(target, facts)
    check_onnx(target)
    counts = count_nodes(target)
    return ExportedFiles(files.plain, target, counts, counts)


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
