"""Time sessions: warm-up until stable, inputs and outputs bound to the device, several in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from quantrack.datasets.pictures import PAD_VALUE
from quantrack.errors import UsageError
from quantrack.progress import track
from quantrack.runtime.session import CPU, Session

BLOCK = 10  # runs of one session before the next one's turn, fewer where there would be under `LEAST_BLOCKS` turns
LEAST_BLOCKS = 5  # fewer medians have no interval to speak of
SETTLING = 3  # runs at the start of a turn that still feel the other session
WARM_UP_BLOCKS = 10
STABLE = 0.05  # two blocks' medians differ by less than this share
RESAMPLES = 1000
Milliseconds = NDArray[np.float64]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one picture through the network: no reading, letterbox or NMS.

    `low` and `high` bound the median at 95 % (bootstrap over blocks of runs); None with fewer than five runs.
    """

    mean: float
    p50: float
    p90: float
    p99: float
    runs: int
    low: float | None
    high: float | None

    def metrics(self) -> dict[str, float]:
        return {
            "latency_ms_mean": self.mean,
            "latency_ms_p50": self.p50,
            "latency_ms_p90": self.p90,
            "latency_ms_p99": self.p99,
        } | _interval_metrics("latency_ms_p50", self.low, self.high)


@dataclass(frozen=True)
class Ratio:
    """The median of one session's latency over another's, and its 95 % interval over the turns, None if too few."""

    median: float
    low: float | None
    high: float | None

    def metrics(self) -> dict[str, float]:
        return {"latency_ratio": self.median} | _interval_metrics("latency_ratio", self.low, self.high)


def _interval_metrics(name: str, low: float | None, high: float | None) -> dict[str, float]:
    return {} if low is None or high is None else {f"{name}_ci_low": low, f"{name}_ci_high": high}


def measure_in_turns(sessions: Sequence[Session], runs: int) -> tuple[tuple[Latency, ...], tuple[Ratio, ...]]:
    """Time sessions in turns of a few runs, so that what disturbs the machine disturbs all alike.

    Returns:
        Each session's latency, and its ratio to the first session's.

    Raises:
        UsageError: `runs` is not positive.
    """
    if runs < 1:
        raise UsageError(f"latency_runs={runs}: must be at least 1")
    block = max(1, min(BLOCK, runs // LEAST_BLOCKS))
    sizes = [min(block, runs - done) for done in range(0, runs, block)]
    timed = [_one_run(session) for session in sessions]
    for run in timed:
        _warm_up(run, block, len(sizes))
    blocks: list[list[Milliseconds]] = [[] for _ in sessions]
    for size in track(sizes, "measuring latency"):
        for place, run in enumerate(timed):
            settling = SETTLING if len(sessions) > 1 else 0
            blocks[place].append(_time(run, settling + size)[settling:])
    medians = [np.array([np.median(block) for block in turns]) for turns in blocks]
    latencies = tuple(_latency(np.concatenate(turns), each) for turns, each in zip(blocks, medians, strict=True))
    return latencies, tuple(Ratio(*_median_interval(each / medians[0])) for each in medians)


def _latency(milliseconds: Milliseconds, medians: Milliseconds) -> Latency:
    p50, p90, p99 = (float(value) for value in np.percentile(milliseconds, [50, 90, 99]))
    _, low, high = _median_interval(medians)
    low, high = low if low is None else min(low, p50), high if high is None else max(high, p50)
    return Latency(float(milliseconds.mean()), p50, p90, p99, len(milliseconds), low, high)


def _median_interval(values: Milliseconds) -> tuple[float, float | None, float | None]:
    """The median of blocks and its 95 % percentile bootstrap, the same for the same values; None of too few."""
    if len(values) < LEAST_BLOCKS:
        return float(np.median(values)), None, None
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def _warm_up(run: Callable[[], object], block: int, blocks: int) -> None:
    """Run until two blocks in a row take the same time: two to ten blocks, no more than there are to time."""
    before = np.inf
    for _ in range(max(2, min(WARM_UP_BLOCKS, blocks))):
        now = float(np.median(_time(run, block)))
        if abs(now - before) <= STABLE * now:
            return
        before = now


def _time(run: Callable[[], object], runs: int) -> Milliseconds:
    seconds = np.empty(runs)
    for index in range(runs):
        start = time.perf_counter()
        run()
        seconds[index] = time.perf_counter() - start
    return seconds * 1000


def _one_run(session: Session) -> Callable[[], object]:
    """What is timed: one grey picture through the network, as the session's settings bind input and output."""
    images = np.full((1, 3, session.imgsz, session.imgsz), PAD_VALUE / 255, np.float32)
    if not session.settings.io_binding:
        return partial(session.run, images)
    binding = _bind(session, images)

    def run() -> None:
        session.inference.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _bind(session: Session, images: NDArray[np.float32]) -> ort.IOBinding:
    """Input and output live on the device, so that host copies are not timed."""
    device = "cpu" if session.provider == CPU else "cuda"
    binding = session.inference.io_binding()
    binding.bind_ortvalue_input(
        session.inference.get_inputs()[0].name, ort.OrtValue.ortvalue_from_numpy(images, device, 0)
    )
    # one fixed buffer, as a captured CUDA graph writes to the same address each time
    shape, name = list(session.output_shape), session.inference.get_outputs()[0].name
    binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0))
    return binding
