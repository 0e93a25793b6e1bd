"""Open an ONNX file on CUDA where it is really there, otherwise on the CPU, and say which."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from quantrack.errors import QuantrackError, UsageError
from quantrack.onnx.inspect import has_integer_convolutions, has_quantizers, sums_can_saturate
from quantrack.progress import say
from quantrack.runtime.exact_sums import EXACT, sums_are_exact

CUDA, CPU, TENSORRT = "cuda", "cpu", "tensorrt"
PROVIDERS = ("auto", CUDA, CPU, TENSORRT)
FULL_NAMES = {
    CUDA: "CUDAExecutionProvider",
    CPU: "CPUExecutionProvider",
    TENSORRT: "TensorrtExecutionProvider",
}
CPU_SHARE = Path("/sys/fs/cgroup/cpu.max")
WRONG_OPTIMIZERS = ["Pad_Fusion"]  # makes a Pad with zeros a part of MaxPool, which pads with minus infinity
OPTIMIZATION = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class SessionSettings:
    """How ONNX Runtime is to run a file; what it computes stays the same but for rounding.

    `fold_weights`: dequantize weights once, as the file is loaded (`session.disable_quant_qdq`), which
    rules out integer kernels. `exact_sums`: integer kernels that do not saturate, for processors where the usual
    ones do (`session.x64quantprecision`). `threads`: 0 = one for each core that this process may use. `tf32` and
    `cuda_graph` concern CUDA only, `fp16` (may compute in float16 where that is faster) TensorRT only. `io_binding`
    says how runs are timed: with input and output on the device, or copied in each run.
    """

    fold_weights: bool = False
    exact_sums: bool = False
    optimization: str = "all"
    threads: int = 0
    tf32: bool = True
    cuda_graph: bool = False
    fp16: bool = False
    io_binding: bool = True

    def __post_init__(self) -> None:
        if self.optimization not in OPTIMIZATION:
            raise UsageError(f"optimization={self.optimization}: unknown level; use one of {', '.join(OPTIMIZATION)}")
        if self.threads < 0:
            raise UsageError(f"threads={self.threads}: must not be negative; 0 = all cores")

    @property
    def text(self) -> str:
        """What differs from the defaults, for people."""
        differing = [
            f"{item.name}={str(getattr(self, item.name)).lower()}"
            for item in fields(self)
            if getattr(self, item.name) != item.default
        ]
        return ", ".join(differing) or "defaults"

    def record(self) -> dict[str, object]:
        """`session.json`: every setting, with the threads that 0 comes to here, and what is off in all sessions."""
        return asdict(self) | {"threads": self.threads or usable_cores(), "disabled_optimizers": WRONG_OPTIMIZERS}


REFERENCE = SessionSettings(optimization="off")  # every node as the file states it, Q/DQ in float


def settings_for(path: Path, provider: str) -> SessionSettings:
    """What the file needs here: exact sums for integer kernels where they would saturate, and folded weights for
    a quantized file without integer kernels, where they save a fifth of the time.

    TensorRT takes the file as it is: it needs the weights' Q/DQ for its own integer kernels.
    """
    if provider == TENSORRT:
        return SessionSettings()
    if has_integer_convolutions(path):
        return SessionSettings(exact_sums=wants_exact_sums(path))
    return SessionSettings(fold_weights=has_quantizers(path))


def wants_exact_sums(path: Path) -> bool:
    """Whether the usual integer kernels of this processor would saturate with a file's weights."""
    return not sums_are_exact() and sums_can_saturate(path)


@dataclass(frozen=True)
class Session:
    """An open ONNX Runtime session, the provider that it really runs on, and its settings."""

    path: Path
    inference: ort.InferenceSession
    provider: str
    settings: SessionSettings

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
        UsageError: it is not auto, cuda, cpu or tensorrt.
    """
    if provider not in PROVIDERS:
        raise UsageError(f"provider={provider}: unknown provider; use one of {', '.join(PROVIDERS)}")
    return provider


def resolve_provider(provider: str) -> str:
    """`cuda`, `cpu` or `tensorrt`: `auto` takes CUDA if it is there, else the CPU, and says so.

    Raises:
        QuantrackError: `cuda` or `tensorrt` was asked for and is not there.
    """
    if parse_provider(provider) == CPU:
        return CPU
    why_not = cuda_problem()
    if why_not is None:
        return TENSORRT if provider == TENSORRT else CUDA
    if provider != "auto":
        name = {CUDA: "CUDA", TENSORRT: "TensorRT"}[provider]
        raise QuantrackError(f"provider={provider}: {name} cannot be used ({why_not}); use provider=cpu or auto")
    _say_once(f"ONNX Runtime runs on the CPU: {why_not}")
    return CPU


@cache
def _say_once(line: str) -> None:
    """A run opens several sessions; one line says it for all."""
    say(line)


def require_cuda() -> None:
    """Check that CUDA can be used, before work starts that needs it.

    Raises:
        QuantrackError: it cannot.
    """
    why_not = cuda_problem()
    if why_not is not None:
        raise QuantrackError(f"require_gpu=true: CUDA cannot be used ({why_not}); use require_gpu=false")


def cuda_problem() -> str | None:
    """Why ONNX Runtime cannot use CUDA here, in one phrase; None if it can try."""
    if FULL_NAMES[CUDA] not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider; install onnxruntime-gpu"
    if not torch.cuda.is_available():
        return "no CUDA device"
    ort.preload_dlls(cuda=True, cudnn=True)  # torch's wheel carries the libraries that the provider needs
    return None


def open_session(path: Path, provider: str, settings: SessionSettings | None = None) -> Session:
    """Open a file on the provider asked for, or resolved from `auto`; with `settings_for` where none are given.

    Raises:
        QuantrackError: `cuda` was asked for and is not there or does not load, or ONNX Runtime
            refuses the file.
    """
    resolved = resolve_provider(provider)
    chosen = settings or settings_for(path, resolved)
    session = _session(path, resolved, chosen)
    if FULL_NAMES[resolved] in session.get_providers():
        return Session(path, session, resolved, chosen)
    why = f"the {resolved} provider did not load; its libraries are missing or do not match the driver"
    if provider != "auto":
        raise QuantrackError(f"provider={provider}: it cannot be used ({why}); use provider=cpu or auto")
    _say_once(f"ONNX Runtime runs on the CPU: {why}")
    return Session(path, _session(path, CPU, chosen), CPU, chosen)


def open_given(path: Path, provider: str) -> Session:
    """As `open_session`, a file that need not be ours: of one float32 picture of a fixed square size.

    Raises:
        QuantrackError: as `open_session`, or it takes something else, or gives a result of no fixed size.
    """
    session = open_session(path, provider)
    inputs, output = session.inference.get_inputs(), session.inference.get_outputs()[0]
    shape = list(inputs[0].shape) if inputs else []
    fixed = all(isinstance(side, int) for side in (*shape, *output.shape))
    square = len(shape) == 4 and shape[:2] == [1, 3] and shape[2] == shape[3]
    floats = {each.type for each in (*inputs, output)} == {"tensor(float)"}
    if len(inputs) != 1 or not floats or not fixed or not square:
        taken = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise QuantrackError(
            f"onnx={path}: takes {taken} and gives {output.type} {output.shape}; Quantrack runs files of one float32 "
            "input [1, 3, N, N], a float32 result and fixed sizes, such as its own: export it without dynamic axes"
        )
    return session


def open_profiled(session: Session, prefix: Path) -> ort.InferenceSession:
    """The same session again, writing ONNX Runtime's profile to a file of this prefix."""
    return _session(session.path, session.provider, session.settings, prefix)


def usable_cores() -> int:
    """Cores that this process may use; ONNX Runtime alone counts the machine's, and its threads then wait."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _quota() or allowed)


def _quota() -> int | None:
    """The cores of a container's share of time, as `docker --cpus` sets it (cgroup v2); None where it has no limit."""
    try:
        quota, period = CPU_SHARE.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # `max`, or no such file
        return None


def _session(path: Path, provider: str, settings: SessionSettings, profile: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # a provider that does not load is reported by us, in one line
    options.intra_op_num_threads = settings.threads or usable_cores()
    options.graph_optimization_level = OPTIMIZATION[settings.optimization]
    # idle threads that spin would slow another session down that is timed beside this one
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if settings.fold_weights:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if settings.exact_sums:
        options.add_session_config_entry(EXACT, "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return ort.InferenceSession(
            str(path), options, providers=_providers(path, provider, settings), disabled_optimizers=WRONG_OPTIMIZERS
        )
    except Exception as error:  # ONNX Runtime's exception classes share no public base
        reason = " ".join(str(error).split())[:200]
        raise QuantrackError(f"onnx={path}: ONNX Runtime cannot open it ({reason})") from error


def _providers(path: Path, provider: str, settings: SessionSettings) -> list[str | tuple[str, dict[str, str]]]:
    if provider == CPU:
        return [FULL_NAMES[CPU]]
    cuda = (FULL_NAMES[CUDA], {"use_tf32": str(int(settings.tf32)), "enable_cuda_graph": str(int(settings.cuda_graph))})
    if provider == CUDA:
        return [cuda, FULL_NAMES[CPU]]
    # TensorRT refuses Q/DQ where its builder may not compute on integers
    integers = str(int(has_quantizers(path)))
    tensorrt = (FULL_NAMES[TENSORRT], {"trt_fp16_enable": str(int(settings.fp16)), "trt_int8_enable": integers})
    return [tensorrt, cuda, FULL_NAMES[CPU]]
