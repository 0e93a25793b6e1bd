"""The PyTorch device that quantization runs on, and what hardware it is."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from quantrack.errors import QuantrackError, UsageError

VNNI = frozenset({"avx512_vnni", "avx_vnni"})


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


def hardware_name(device: torch.device) -> str:
    """The GPU or the processor behind a device: of another one the same sums come out a little different."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """The CPU's name and what else tells it from others."""
    info = Path("/proc/cpuinfo")
    known = processor_text(info.read_text()) if info.is_file() else ""
    return known or platform.processor() or platform.machine()


def processor_text(info: str) -> str:
    """The first processor of `/proc/cpuinfo`; empty where it has no name (ARM).

    Clouds call processors of several generations by one name, so family and model stand with it, and whether it
    has VNNI, which decides how fast integer kernels are.

    >>> processor_text("model name: AMD EPYC\\ncpu family: 25\\nmodel: 17\\nflags: sse avx512_vnni\\n")
    'AMD EPYC (family 25, model 17, VNNI)'
    """
    pairs = (line.partition(":")[::2] for line in info.partition("\n\n")[0].splitlines())
    said = {name.strip(): value.strip() for name, value in pairs}
    if "model name" not in said:
        return ""
    parts = [f"{what} {said[key]}" for key, what in (("cpu family", "family"), ("model", "model")) if key in said]
    parts += ["VNNI"] if VNNI.intersection(said.get("flags", "").split()) else []
    return said["model name"] + (f" ({', '.join(parts)})" if parts else "")
