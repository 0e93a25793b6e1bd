"""Time a session: warm-up, inputs and outputs bound to the device, percentiles."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from quantrack.errors import UsageError
from quantrack.progress import track
from quantrack.runtime.session import CUDA, Session

WARM_UP_RUNS = 10


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one picture through the network: no reading, letterbox or NMS."""

    mean: float
    p50: float
    p90: float
    p99: float
    runs: int

    def metrics(self) -> dict[str, float]:
        return {
            "latency_ms_mean": self.mean,
            "latency_ms_p50": self.p50,
            "latency_ms_p90": self.p90,
            "latency_ms_p99": self.p99,
        }


def measure_latency(session: Session, runs: int) -> Latency:
    """Time `runs` single-picture runs after a warm-up.

    Raises:
        UsageError: `runs` is not positive.
    """
    if runs < 1:
        raise UsageError(f"latency_runs={runs}: must be at least 1")
    binding = _bind(session)
    for _ in range(WARM_UP_RUNS):
        session.inference.run_with_iobinding(binding)
    binding.synchronize_outputs()
    seconds = np.empty(runs)
    for index in track(range(runs), "measuring latency"):
        start = time.perf_counter()
        session.inference.run_with_iobinding(binding)
        binding.synchronize_outputs()
        seconds[index] = time.perf_counter() - start
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99]) * 1000
    return Latency(float(seconds.mean() * 1000), float(p50), float(p90), float(p99), runs)


def _bind(session: Session) -> ort.IOBinding:
    """Input and output live on the device, so that host copies are not timed."""
    device = "cuda" if session.provider == CUDA else "cpu"
    images = np.full((1, 3, session.imgsz, session.imgsz), 114 / 255, np.float32)
    binding = session.inference.io_binding()
    value = ort.OrtValue.ortvalue_from_numpy(images, device, 0)
    binding.bind_ortvalue_input(session.inference.get_inputs()[0].name, value)
    binding.bind_output(session.inference.get_outputs()[0].name, device)
    return binding
