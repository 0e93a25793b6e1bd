"""The thin shell around a pipeline: command line in, one tracked run, exit code out."""

from __future__ import annotations

import inspect
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType
from typing import Annotated, TypeVar

import typer

from quantrack.allocator import keep_freed_memory
from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import say
from quantrack.settings import default_texts, parse_settings, setting_name
from quantrack.tracking.run import tracked_run

S = TypeVar("S")
INTERRUPTED = 130
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last as a terminal is closed
TOGETHER = 5.0  # seconds


def run_entry_point(name: str, settings_type: type[S], pipeline: Callable[[S], None]) -> None:
    """Turn a pipeline into a command: one kebab-case option per setting, one MLflow run per call.

    Exits with 2 for a refused setting, 1 for a failure and 130 when interrupted; each time the user
    sees one line, and the run carries it as the tag `failure_reason`.
    """
    keep_freed_memory()

    def command(**by_field: str) -> None:
        texts = {setting_name(item): by_field[item.name] for item in fields(settings_type)}  # type: ignore[arg-type]
        # a run that goes on with another has that one's settings, not the defaults
        logged = {"resume": texts["resume"]} if texts.get("resume") else texts
        _run(name, logged, lambda: pipeline(parse_settings(settings_type, texts)))

    command.__signature__ = _signature(settings_type)  # type: ignore[attr-defined]
    command.__doc__ = inspect.getdoc(pipeline)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(command)
    stranger = _unknown_option(sys.argv[1:], settings_type)
    with _interruptible():
        if stranger is None:
            app()
        else:
            _run(name, {}, lambda: _refuse(f"{stranger}: unknown option; --help lists those of {name}"))


def _run(name: str, texts: dict[str, str], work: Callable[[], None]) -> None:
    """Do the work in a tracked run; errors become one line and an exit code."""
    with exit_on_error("what was logged so far stays in the run"), tracked_run(name, texts):
        work()


@contextmanager
def exit_on_error(when_interrupted: str) -> Iterator[None]:
    """Exit with 2 for a refused setting, 1 for a failure and 130 when interrupted; one line says why."""
    try:
        yield
    except QuantrackError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        say(f"error: {_where_and_why(error)}")
        sys.exit(1)
    except KeyboardInterrupt:
        say(f"interrupted; {when_interrupted}")
        sys.exit(INTERRUPTED)


def _where_and_why(error: OSError) -> str:
    """The place and the reason, without Python's number of the error."""
    places = " and ".join(str(place) for place in (error.filename, error.filename2) if place is not None)
    return f"{places}: {error.strerror}" if places and error.strerror else str(error)


def _refuse(message: str) -> None:
    raise UsageError(message)


def _unknown_option(arguments: list[str], settings_type: type[object]) -> str | None:
    """The first option that is no setting: `mlflow run` passes any `-P` on, and its run must say why."""
    known = {_option(setting_name(item)) for item in fields(settings_type)} | {"--help"}  # type: ignore[arg-type]
    options = (argument.split("=")[0] for argument in arguments if argument.startswith("--"))
    return next((option for option in options if option not in known), None)


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _signature(settings_type: type[object]) -> inspect.Signature:
    """One text option per setting; the settings themselves convert and validate."""
    defaults = default_texts(settings_type)
    parameters = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[setting_name(item)],
            annotation=Annotated[str, typer.Option(_option(setting_name(item)), help=item.metadata["help"])],
        )
        for item in fields(settings_type)  # type: ignore[arg-type]
    ]
    return inspect.Signature(parameters)


class _Interrupts:
    """One interrupt for signals that come together: after Ctrl-C `mlflow run` sends another, amid the run's ending."""

    def __init__(self) -> None:
        self.last = -math.inf

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self.last > TOGETHER:
            self.last = now
            raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, `kill` and a closed terminal interrupt.

    Unless whoever started this process has it ignore them, as `nohup` does.
    """
    interrupts = _Interrupts()
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, interrupts)
        yield
    finally:
        # after an interrupt the process ends, and another signal of the same one may still come
        interrupted = interrupts.last > -math.inf
        for number in heeded:
            signal.signal(number, signal.SIG_IGN if interrupted else before[number])
