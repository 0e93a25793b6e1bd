"""The thin shell around a pipeline: command line in, one tracked run, exit code out."""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, TypeVar

import typer

from quantrack.allocator import keep_freed_memory
from quantrack.errors import QuantrackError, UsageError, place_and_reason
from quantrack.interrupts import INTERRUPTED, OWN, RUN_VARIABLE, interruptible
from quantrack.progress import say
from quantrack.settings import default_texts, parse_settings, setting_name
from quantrack.tracking.run import tracked_run

S = TypeVar("S")


def run_entry_point(name: str, settings_type: type[S], pipeline: Callable[[S], None]) -> None:
    """Turn a pipeline into a command: one kebab-case option per setting, one MLflow run per call.

    Exits with 2 for a refused setting, 1 for a failure and 130 when interrupted; each time the user
    sees one line, and the run carries it as the tag `failure_reason`.
    """
    gc.enable()  # `program` turned it off for the imports
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
    with interruptible():
        if stranger is None:
            app()
        else:
            _run(name, {}, lambda: _refuse(f"{stranger}: unknown option; --help lists those of {name}"))


def _run(name: str, texts: dict[str, str], work: Callable[[], None]) -> None:
    """Do the work in a tracked run; errors become one line and an exit code."""
    with exit_on_error("what was logged so far stays in the run"), tracked_run(name, texts):
        OWN.raise_if_waiting()
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
        say(f"error: {place_and_reason(error)}")
        sys.exit(1)
    except KeyboardInterrupt:
        say(f"interrupted; {when_interrupted}")
        sys.exit(INTERRUPTED)


def _refuse(message: str) -> None:
    raise UsageError(message)


def _unknown_option(arguments: list[str], settings_type: type[object]) -> str | None:
    """The first option that is no setting: `mlflow run` passes any `-P` on, `help` too, and its run must say why."""
    known = {_option(setting_name(item)) for item in fields(settings_type)}  # type: ignore[arg-type]
    known |= set() if RUN_VARIABLE in os.environ else {"--help"}
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
