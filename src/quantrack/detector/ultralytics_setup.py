"""Import Ultralytics without its side effects.

By itself it installs packages at run time, writes a settings file into the user's home, sends
analytics, evaluates code in architecture files and logs to standard output. `prepare` must run
before its first import; every file of this room imports it only after calling `prepare`.
"""

from __future__ import annotations

import logging
import os

from quantrack.cache import cache_folder, variable_kept


def prepare() -> None:
    """Set what Ultralytics reads when it is imported; its settings live in our cache, not in the home."""
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["YOLO_VERBOSE"] = "false"
    os.environ["YOLO_CONFIG_DIR"] = str(cache_folder() / "ultralytics")
    os.environ["ULTRALYTICS_SAFE_LOAD"] = "true"  # `activation:` in a *.yaml is parsed, not evaluated
    logger = logging.getLogger("ultralytics")
    logger.setLevel(logging.ERROR)
    with variable_kept("YOLO_OFFLINE"):
        os.environ["YOLO_OFFLINE"] = "true"  # no name look-ups while it is imported; a download may look later
        from ultralytics.nn import tasks
        from ultralytics.utils import SETTINGS

    tasks.SAFE_LOAD = True  # the variable is read at its import, which may have been before us
    logger.setLevel(logging.ERROR)  # its import sets the level again
    # Analytics and crash reports off, in memory only: if someone imported Ultralytics before us,
    # SETTINGS is the user's own file, and SETTINGS["sync"] = ... would write it.
    dict.__setitem__(SETTINGS, "sync", False)
