"""Import Ultralytics without its side effects.

By itself it installs packages at run time, writes a settings file into the user's home, sends
analytics, evaluates code in architecture files and logs to standard output. `prepare` must run
before its first import; every file of this room imports it only after calling `prepare`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Quantrack's own cache: `QUANTRACK_CACHE`, or `~/.cache/quantrack`."""
    chosen = os.environ.get("QUANTRACK_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache/quantrack"


@contextmanager
def fresh_cache() -> Iterator[None]:
    """A cache that holds nothing but the downloaded weights, for a while: all steps are done anew."""
    weights = cache_folder() / "weights"
    with tempfile.TemporaryDirectory() as folder:
        if weights.is_dir():
            (Path(folder) / "weights").symlink_to(weights.resolve())
        with _variable("QUANTRACK_CACHE", folder):
            yield


def prepare() -> None:
    """Set what Ultralytics reads when it is imported; its settings live in our cache, not in the home."""
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["YOLO_VERBOSE"] = "false"
    os.environ["YOLO_CONFIG_DIR"] = str(cache_folder() / "ultralytics")
    os.environ["ULTRALYTICS_SAFE_LOAD"] = "true"  # `activation:` in a *.yaml is parsed, not evaluated
    logger = logging.getLogger("ultralytics")
    logger.setLevel(logging.ERROR)
    with _variable("YOLO_OFFLINE", "true"):  # no name look-ups while it is imported; a download may look later
        from ultralytics.nn import tasks
        from ultralytics.utils import SETTINGS

    tasks.SAFE_LOAD = True  # the variable is read at its import, which may have been before us
    logger.setLevel(logging.ERROR)  # its import sets the level again
    # Analytics and crash reports off, in memory only: if someone imported Ultralytics before us,
    # SETTINGS is the user's own file, and SETTINGS["sync"] = ... would write it.
    dict.__setitem__(SETTINGS, "sync", False)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable, for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
