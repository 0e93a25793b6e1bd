"""Where Quantrack keeps what can be made again: finished steps, downloaded weights, trainings under way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "QUANTRACK_CACHE"


def cache_folder() -> Path:
    """Quantrack's own cache: `QUANTRACK_CACHE`, or `~/.cache/quantrack`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).resolve() if chosen else Path.home() / ".cache/quantrack"


@contextmanager
def fresh_cache() -> Iterator[None]:
    """A cache that holds nothing but the downloaded weights, for a while: all steps are done anew."""
    weights = cache_folder() / "weights"
    with tempfile.TemporaryDirectory() as folder, variable_kept(CACHE_VARIABLE):
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
