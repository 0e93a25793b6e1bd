"""Ctrl-C, `kill` and a closed terminal, from a program's first moment on.

Imports take seconds, and libraries that are interrupted amid theirs swallow it, or fail in words of their own. So
programs heed signals before they import anything else (`program`, `console`): until the work begins they end at once
or, where `mlflow run` has begun a run, as soon as the run can be told why.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130  # the exit code
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last as a terminal is closed
RUN_VARIABLE = "MLFLOW_RUN_ID"  # set where `mlflow run` has begun the run
TOGETHER = 5.0  # seconds
STANDARD_ERROR = 2


class Interrupts:
    """One interrupt for signals that come together: after Ctrl-C `mlflow run` sends another, amid the run's ending."""

    def __init__(self) -> None:
        self.before: dict[signal.Signals, object] = {}  # the handlers that are to be given back
        self.last = -math.inf
        self.working = False
        self.waiting = False

    def heed(self) -> None:
        """Handle these signals, unless whoever started this process has it ignore them, as `nohup` does."""
        if self.before or threading.current_thread() is not threading.main_thread():
            return
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
        for number in self.before:
            signal.signal(number, self)

    def give_back(self) -> None:
        """As it was before; after an interrupt another signal of the same one may still come, and is ignored."""
        for number, handler in self.before.items():
            signal.signal(number, handler if self.last == -math.inf else signal.SIG_IGN)  # type: ignore[arg-type]
        self.before, self.last, self.working, self.waiting = {}, -math.inf, False, False

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self.last <= TOGETHER:
            return
        self.last = now
        if self.working:
            raise KeyboardInterrupt
        if RUN_VARIABLE not in os.environ or self.waiting:
            with suppress(OSError):  # the terminal may be gone
                os.write(STANDARD_ERROR, b"interrupted\n")
            os._exit(INTERRUPTED)  # an exception would be the importing library's
        self.waiting = True

    def raise_if_waiting(self) -> None:
        """Be interrupted by what came before the work began.

        Raises:
            KeyboardInterrupt: a signal came.
        """
        if self.waiting:
            self.waiting = False
            raise KeyboardInterrupt


OWN = Interrupts()  # of this process, as signals are


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, these signals raise KeyboardInterrupt."""
    OWN.heed()
    OWN.working = True
    try:
        yield
    finally:
        OWN.give_back()
