"""Prepare `data_root`: download what is needed of COCO 2017, or build it from a copy."""

from __future__ import annotations

from pathlib import Path

import quantrack.program  # noqa: F401
from quantrack.datasets.download import build_from_source, download_coco
from quantrack.entry import run_entry_point
from quantrack.settings import DataSettings
from quantrack.tracking.log import log_prepared_data


def data(settings: DataSettings) -> None:
    """Fetch annotations and the listed pictures into data_root (official COCO layout); resumes."""
    if settings.source:
        prepared = build_from_source(settings.download, Path(settings.source))
    else:
        prepared = download_coco(settings.download)
    log_prepared_data(prepared)


if __name__ == "__main__":
    run_entry_point("data", DataSettings, data)
