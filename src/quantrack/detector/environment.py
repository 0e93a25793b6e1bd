"""Import Ultralytics without its side effects.

By itself it installs packages at run time, writes a settings file into the user's home, sends
analytics and logs to standard output. `prepare` must run before its first import.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path


def cache_folder() -> Path:
    """Quantrack's own cache: `QUANTRACK_CACHE`, or `~/.cache/quantrack`."""
    chosen = os.environ.get("QUANTRACK_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache/quantrack"


def prepare() -> None:
    """Set what Ultralytics reads when it is imported; its settings live in our cache, not in the home."""
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["YOLO_VERBOSE"] = "false"
    os.environ["YOLO_CONFIG_DIR"] = str(cache_folder() / "ultralytics")
    logger = logging.getLogger("ultralytics")
    logger.setLevel(logging.ERROR)
    from ultralytics.utils import SETTINGS

    logger.setLevel(logging.ERROR)  # its import sets the level again
    if SETTINGS["sync"]:  # analytics and crash reports; our own settings file, so it may be written
        SETTINGS.update({"sync": False})
