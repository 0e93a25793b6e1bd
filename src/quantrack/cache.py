"""Where Quantrack keeps what can be made again: finished steps, downloaded weights, trainings under way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantrack.errors import QuantrackError

CACHE_VARIABLE = "QUANTRACK_CACHE"
FRESH = ".fresh"  # lies in a cache that goes with its process


def cache_folder() -> Path:
    """Quantrack's own cache: `QUANTRACK_CACHE`, or `~/.cache/quantrack`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).resolve() if chosen else Path.home() / ".cache/quantrack"


def writable_folder(*parts: str) -> Path:
    """A folder within the cache that something has to be written to.

    Raises:
        QuantrackError: it cannot be.
    """
    folder = cache_folder().joinpath(*parts)
    reason = "permission denied"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError as error:
        reason = str(error.strerror).lower()
    raise QuantrackError(f"{folder}: cannot be written ({reason}); set {CACHE_VARIABLE} to a folder that can be")


def cache_lasts() -> bool:
    """Whether another process will find what is kept now; not within `fresh_cache`."""
    return not (cache_folder() / FRESH).exists()


@contextmanager
def fresh_cache() -> Iterator[None]:
    """A cache that holds nothing but the downloaded weights, for a while: all steps are done anew."""
    weights = cache_folder() / "weights"
    with tempfile.TemporaryDirectory() as folder, variable_kept(CACHE_VARIABLE):
        (Path(folder) / FRESH).touch()
        if weights.is_dir():
            (Path(folder) / "weights").symlink_to(weights.resolve())
        os.environ[CACHE_VARIABLE] = folder
        yield


@contextmanager
def variable_kept(name: str) -> Iterator[None]:
    """Give an environment variable its present value back at the end, whatever becomes of it meanwhile."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
