"""Open an ONNX file on CUDA where it is really there, otherwise on the CPU, and say which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
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


def open_session(path: Path, provider: str) -> Session:
    """Open a file on the provider asked for; `auto` takes CUDA if it works, else the CPU, and says so.

    Raises:
        QuantrackError: `cuda` was asked for and is not there, or ONNX Runtime refuses the file.
    """
    parse_provider(provider)
    if provider == CPU:
        return _open(path, CPU)
    why_not = cuda_problem(path)
    if why_not is None:
        return _open(path, CUDA)
    if provider == CUDA:
        raise QuantrackError(f"provider=cuda: CUDA cannot be used ({why_not}); use provider=cpu or auto")
    say(f"{path.name}: runs on the CPU ({why_not})")
    return _open(path, CPU)


def cuda_problem(path: Path) -> str | None:
    """Why this file cannot run on CUDA here, in one phrase; None if it can."""
    if FULL_NAMES[CUDA] not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider; install onnxruntime-gpu"
    import torch  # its wheel carries the CUDA and cuDNN libraries that the provider needs

    if not torch.cuda.is_available():
        return "no CUDA device"
    ort.preload_dlls(cuda=True, cudnn=True)
    taken = _session(path, CUDA).get_providers()
    return (
        None if FULL_NAMES[CUDA] in taken else "the CUDA provider did not load; its libraries do not match the driver"
    )


def _open(path: Path, provider: str) -> Session:
    return Session(path, _session(path, provider), provider)


def _session(path: Path, provider: str, profile: Path | None = None) -> ort.InferenceSession:
    order = (CUDA, CPU) if provider == CUDA else (CPU,)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # a provider that does not load is reported by us, in one line
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
