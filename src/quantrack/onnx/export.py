"""Export a model to ONNX at a fixed shape, with one input `images` and one output `output0`.

This is the only place outside `quantization` that knows Brevitas: its QCDQ exporter.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from brevitas.export import export_onnx_qcdq
from torch import nn

from quantrack.files import atomic_path

OPSET = 17
INPUT_NAME = "images"
OUTPUT_NAME = "output0"


def export_float(model: nn.Module, imgsz: int, path: Path) -> None:
    """Write a float32 model as ONNX, opset 17, input [1, 3, imgsz, imgsz]."""
    example = _example(model, imgsz)
    with atomic_path(path) as temporary, _quiet():
        torch.onnx.export(
            model, (example,), str(temporary), opset_version=OPSET, input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME], dynamo=False,
        )  # fmt: skip


def export_qcdq(model: nn.Module, imgsz: int, path: Path) -> None:
    """Write a Brevitas model as QuantizeLinear-Clip-DequantizeLinear ONNX, opset 17.

    Weights are stored as INT8 initializers, whatever their bits; below 8 bits a Clip states the
    range. The TorchScript exporter is used because the dynamo one keeps float weights, and
    initializers are not graph inputs because ONNX Runtime could then fold none of them.
    """
    example = _example(model, imgsz)
    with atomic_path(path) as temporary, _quiet():
        export_onnx_qcdq(
            model, args=example, export_path=str(temporary), opset_version=OPSET, dynamo=False,
            keep_initializers_as_inputs=False, input_names=[INPUT_NAME], output_names=[OUTPUT_NAME],
        )  # fmt: skip


def _example(model: nn.Module, imgsz: int) -> torch.Tensor:
    return torch.zeros(1, 3, imgsz, imgsz, device=next(model.parameters()).device)


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracer warns at each shape that it fixes; fixed shapes are what is wanted here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
