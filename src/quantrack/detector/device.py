"""The PyTorch device that quantization runs on."""

from __future__ import annotations

import torch

from quantrack.errors import QuantrackError, UsageError


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU.

    Raises:
        UsageError: the name is no CPU or CUDA device, or another GPU than the first, which ONNX Runtime takes.
        QuantrackError: CUDA was asked for and is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device={device}: unknown device; use auto, cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise QuantrackError(f"device={device}: no such CUDA device here; use device=cpu or auto")
    if chosen.type == "cuda" and chosen.index:
        raise UsageError(
            f"device={device}: ONNX Runtime measures on the first GPU; let CUDA_VISIBLE_DEVICES name that one alone, "
            "and give device=cuda"
        )
    return chosen


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32; processors without its instructions emulate it, and take longer."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
