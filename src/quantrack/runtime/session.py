"""Open an ONNX file on CUDA where it is really there, otherwise on the CPU, and say which."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import say

CUDA, CPU = "cuda", "cpu"
PROVIDERS = ("auto", CUDA, CPU)
FULL_NAMES = {CUDA: "CUDAExecutionProvider", CPU: "CPUExecutionProvider"}


@dataclass(frozen=True)
class Session:
    """An open ONNX Runtime session and the provider that it really runs on, `cuda` or `cpu`."""

    path: Path
    inference: ort.InferenceSession
    provider: str

    @property
    def imgsz(self) -> int:
        """Side of the square input in pixels."""
        return int(self.inference.get_inputs()[0].shape[2])

    @property
    def output_shape(self) -> tuple[int, ...]:
        return tuple(int(side) for side in self.inference.get_outputs()[0].shape)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw output of one batch [1, 3, imgsz, imgsz]."""
        name = self.inference.get_inputs()[0].name
        return np.asarray(self.inference.run(None, {name: images})[0], dtype=np.float32)


def parse_provider(provider: str) -> str:
    """Check a provider setting.

    Raises:
        UsageError: it is not auto, cuda or cpu.
    """
    if provider not in PROVIDERS:
        raise UsageError(f"provider={provider}: unknown provider; use one of {', '.join(PROVIDERS)}")
    return provider


def resolve_provider(provider: str) -> str:
    """`cuda` or `cpu`: `auto` takes CUDA if it is there, else the CPU, and says so.

    Raises:
        QuantrackError: `cuda` was asked for and is not there.
    """
    if parse_provider(provider) == CPU:
        return CPU
    why_not = cuda_problem()
    if why_not is None:
        return CUDA
    if provider == CUDA:
        raise QuantrackError(f"provider=cuda: CUDA cannot be used ({why_not}); use provider=cpu or auto")
    say(f"ONNX Runtime runs on the CPU: {why_not}")
    return CPU


def cuda_problem() -> str | None:
    """Why ONNX Runtime cannot use CUDA here, in one phrase; None if it can try."""
    if FULL_NAMES[CUDA] not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider; install onnxruntime-gpu"
    if not torch.cuda.is_available():
        return "no CUDA device"
    ort.preload_dlls(cuda=True, cudnn=True)  # torch's wheel carries the libraries that the provider needs
    return None


def open_session(path: Path, provider: str) -> Session:
    """Open a file on the provider asked for, or resolved from `auto`.

    Raises:
        QuantrackError: `cuda` was asked for and is not there or does not load, or ONNX Runtime
            refuses the file.
    """
    resolved = resolve_provider(provider)
    session = _session(path, resolved)
    if FULL_NAMES[resolved] in session.get_providers():
        return Session(path, session, resolved)
    why = "the CUDA provider did not load; its libraries do not match the driver"
    if provider == CUDA:
        raise QuantrackError(f"provider=cuda: CUDA cannot be used ({why}); use provider=cpu or auto")
    say(f"ONNX Runtime runs on the CPU: {why}")
    return Session(path, _session(path, CPU), CPU)


def usable_cores() -> int:
    """Cores that this process may run on; ONNX Runtime alone counts the machine's, and its threads then wait."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _session(path: Path, provider: str, profile: Path | None = None) -> ort.InferenceSession:
    order = (CUDA, CPU) if provider == CUDA else (CPU,)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # a provider that does not load is reported by us, in one line
    options.intra_op_num_threads = usable_cores()
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return ort.InferenceSession(str(path), options, providers=[FULL_NAMES[name] for name in order])
    except Exception as error:  # ONNX Runtime's exception classes share no public base
        reason = " ".join(str(error).split())[:200]
        raise QuantrackError(f"onnx={path}: ONNX Runtime cannot open it ({reason})") from error


def open_profiled(path: Path, provider: str, prefix: Path) -> ort.InferenceSession:
    """A session that writes ONNX Runtime's profile to a file of this prefix."""
    return _session(path, provider, prefix)
