"""The PyTorch device that quantization runs on."""

from __future__ import annotations

import torch

from quantrack.errors import QuantrackError, UsageError


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU.

    Raises:
        UsageError: the name is no CPU or CUDA device.
        QuantrackError: CUDA was asked for and is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device={device}: unknown device; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise QuantrackError(f"device={device}: no such CUDA device here; use device=cpu or auto")
    return chosen


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32; processors without its instructions take longer."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
