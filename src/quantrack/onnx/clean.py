"""Simplify an exported graph without touching its quantizers; or turn it to float16."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxslim
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from quantrack.errors import QuantrackError
from quantrack.files import atomic_path
from quantrack.onnx.graph import read_graph
from quantrack.onnx.input_scales import fold_input_scales
from quantrack.onnx.inspect import count_nodes, has_quantizers, load_onnx, require_same_qdq
from quantrack.onnx.opset import load_newer


def clean_graph(source: Path, target: Path) -> None:
    """Fold constants and shapes of `source` into `target`, and scales of channels; every Q/DQ node kept.

    Raises:
        QuantrackError: the simplifier failed or a Q/DQ node vanished.
    """
    before = count_nodes(source)
    graph = read_graph(source)
    fold_input_scales(graph)
    try:
        # convolutions that share an input have equal quantizers; merging those is ONNX Runtime's business
        cleaned = onnxslim.slim(graph.model, skip_optimizations=["subexpression_elimination"])
    except Exception as error:  # the simplifier raises whatever its passes meet
        raise QuantrackError(f"{source}: onnxslim failed ({type(error).__name__}: {error})") from error
    with atomic_path(target) as temporary:
        onnx.save(cleaned, str(temporary))
    require_same_qdq(before, count_nodes(target), target)


def convert_to_float16(source: Path, target: Path) -> None:
    """Write a float16 copy of a float32 graph, quantizers' scales too; input and output stay float32.

    Boxes are decoded in cells and then multiplied by their stride, in float16 as well: results have steps of half a
    pixel from 512 pixels on, and of a pixel from 1,024 on.
    """
    model = load_newer(source) if has_quantizers(source) else load_onnx(source)
    converted = convert_float_to_float16(model, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST)
    OnnxModel(converted).topological_sort()  # the converter appends its casts at the end
    del converted.graph.value_info[:]  # it still has the types of before
    with atomic_path(target) as temporary:
        onnx.save(converted, str(temporary))
