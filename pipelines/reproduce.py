"""Do a finished run again from its record, and say whether the same comes of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baseline import baseline
from evaluate import evaluate
from ptq import ptq
from qat import qat

import quantrack.program  # noqa: F401
from quantrack.cache import fresh_cache
from quantrack.entry import run_entry_point
from quantrack.errors import QuantrackError
from quantrack.progress import say
from quantrack.settings import ReproduceSettings, setting_texts
from quantrack.tracking.reproduce import log_reproduction, read_record
from quantrack.tracking.run import name_run, tracked_run

PIPELINES: Mapping[str, Callable[[Any], None]] = {"baseline": baseline, "ptq": ptq, "qat": qat, "evaluate": evaluate}


def reproduce(settings: ReproduceSettings) -> None:
    """Run baseline, ptq, qat or evaluate again from a run's record; fails if metrics, digests or files differ."""
    with tempfile.TemporaryDirectory() as folder, fresh_cache():
        record = read_record(settings.run_id, settings.data_root, Path(folder))
        name_run(f"reproduce-{record.run.info.run_name}")
        with tracked_run(record.entry_point, setting_texts(record.settings), nested=True) as again:
            PIPELINES[record.entry_point](record.settings)
        found = log_reproduction(record, again.info.run_id)
    if found:
        listed = "; ".join(difference.text for difference in found[:5])
        more = f"; and {len(found) - 5} more in reproduction.json" if len(found) > 5 else ""
        raise QuantrackError(f"run {settings.run_id} was not reproduced: {listed}{more}")
    say(f"run {settings.run_id} is reproduced: all that was compared (reproduction.json) is equal")


if __name__ == "__main__":
    run_entry_point("reproduce", ReproduceSettings, reproduce)
