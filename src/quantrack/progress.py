"""Progress bars for long work, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn

T = TypeVar("T")

_console = Console(stderr=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar; quiet where standard error is not a terminal."""
    with new_bar() as bar:
        yield from bar.track(items, total, description=description)


def new_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar to be moved by hand; quiet where standard error is not a terminal."""
    # what goes to a file or another program must not be taken to the bar's terminal
    mixed = sys.stdout is not None and sys.stdout.isatty()  # None where it is closed
    return Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal, redirect_stdout=mixed)


def say(line: str) -> None:
    """One status line to the user, on standard error; nothing where that is a terminal that is gone."""
    with suppress(OSError):
        _console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
