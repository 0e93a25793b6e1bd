"""How busy others keep this machine, and how much memory this process took: what a timing must be read with."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROCESSOR_TIMES = Path("/proc/stat")
OTHERS = "busy_cores_of_others"  # the metric
BUSY = 0.25  # of a core, from which timings are in doubt


@dataclass
class OtherLoad:
    """Cores that other processes kept busy while this was watched; None where the system does not say."""

    cores: float | None = None

    @property
    def disturbs(self) -> bool:
        return self.cores is not None and self.cores > BUSY

    def metrics(self) -> dict[str, float]:
        return {} if self.cores is None else {OTHERS: self.cores}


@contextmanager
def watch_other_load() -> Iterator[OtherLoad]:
    """Measure while the block runs; the result is there after it."""
    load = OtherLoad()
    start, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    yield load
    seconds = time.perf_counter() - start
    end = _busy_seconds()
    if busy is not None and end is not None and seconds > 0:
        load.cores = max(0.0, (end - busy - (_own_seconds() - own)) / seconds)


def peak_memory_mb() -> float:
    """The most memory that this process held so far (resident set), in MB of 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1_000_000


def _own_seconds() -> float:
    return time.process_time()


def _busy_seconds() -> float | None:
    """Seconds that all processors together have worked since the system started (proc(5))."""
    try:
        fields = PROCESSOR_TIMES.read_text().splitlines()[0].split()[1:]
        user, nice, system, _, _, interrupts, soft, stolen = (int(value) for value in fields[:8])
    except (OSError, ValueError, IndexError):
        return None
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
