"""Ctrl-C, `kill` and a closed terminal, from a program's first moment on.

Imports take seconds, and libraries that are interrupted amid theirs swallow it, or fail in words of their own. So
programs heed signals before they import anything else (`program`): until the work begins they end at once or, where
`mlflow run` has begun a run, as soon as the run can be told why.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # the exit code
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last as a terminal is closed
RUN_VARIABLE = "MLFLOW_RUN_ID"  # set where `mlflow run` has begun the run
TOGETHER = 5.0  # seconds
STANDARD_ERROR = 2


class Interrupts:
    """One interrupt for signals that come together: after Ctrl-C `mlflow run` sends another, amid the run's ending."""

    def __init__(self) -> None:
        self.last = -math.inf
        self.working = False
        self.waiting = False

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self.last <= TOGETHER:
            return
        self.last = now
        if self.working:
            raise KeyboardInterrupt
        if RUN_VARIABLE not in os.environ or self.waiting:
            os.write(STANDARD_ERROR, b"interrupted\n")
            os._exit(INTERRUPTED)  # an exception would be the importing library's
        self.waiting = True


def heed() -> Interrupts:
    """Let these signals interrupt, unless whoever started this process has it ignore them, as `nohup` does."""
    handlers = [signal.getsignal(number) for number in INTERRUPTS]
    found = next((handler for handler in handlers if isinstance(handler, Interrupts)), None) or Interrupts()
    for number in INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, found)
    return found


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, these signals raise KeyboardInterrupt."""
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    interrupts = heed()
    interrupts.working = True
    try:
        yield
    finally:
        # after an interrupt the process ends, and another signal of the same one may still come
        interrupted = interrupts.last > -math.inf
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_IGN if interrupted else handler)


def raise_if_waiting() -> None:
    """Be interrupted by what came before the work began.

    Raises:
        KeyboardInterrupt: a signal came.
    """
    interrupts = signal.getsignal(signal.SIGINT)
    if isinstance(interrupts, Interrupts) and interrupts.waiting:
        interrupts.waiting = False
        raise KeyboardInterrupt
