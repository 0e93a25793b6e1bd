"""Progress bars for long work, on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.progress import track as rich_track

T = TypeVar("T")

_console = Console(stderr=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar; quiet where standard error is not a terminal."""
    yield from rich_track(
        items, description, total=total, console=_console, transient=True, disable=not _console.is_terminal
    )


def new_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar to be moved by hand; quiet where standard error is not a terminal."""
    return Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal)


def say(line: str) -> None:
    """One status line to the user, on standard error."""
    _console.print(line, highlight=False, markup=False, soft_wrap=True)
