"""Hold runs against each other over resampled pictures, from the detections that they logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from quantrack.comparison.runs import ComparedRun
from quantrack.datasets.coco import EvaluationSet, load_evaluation_set
from quantrack.errors import QuantrackError
from quantrack.evaluation.bootstrap import BootstrapSettings, resampled_map
from quantrack.evaluation.coco_metrics import detections_from_json
from quantrack.progress import say
from quantrack.settings import BaselineSettings, parse_settings
from quantrack.tracking.read import has_artifact, read_json, require_run

DETECTIONS = "detections.json"


def resampled_runs(runs: Sequence[ComparedRun]) -> tuple[ComparedRun, ...]:
    """The runs, those measured alike with their mAP on resampled pictures.

    The pictures are read where the first run on them read them; where they are no longer there as they were, that
    is said, and the runs stay as they are.
    """
    alike = Counter(run.circumstances for run in runs)
    sets: dict[str, EvaluationSet | None] = {}
    found = []
    for run in runs:
        if alike[run.circumstances] < 2 or not has_artifact(run.run_id, DETECTIONS):
            found.append(run)
            continue
        digest = run.circumstances.evaluation_digest
        if digest not in sets:
            sets[digest] = _evaluation_set(run)
        found.append(_resampled(run, sets[digest]))
    return tuple(found)


def _resampled(run: ComparedRun, evaluation_set: EvaluationSet | None) -> ComparedRun:
    if evaluation_set is None:
        return run
    detections = detections_from_json(read_json(run.run_id, DETECTIONS))
    return replace(run, resampled=resampled_map(evaluation_set, detections, BootstrapSettings()))


def _evaluation_set(run: ComparedRun) -> EvaluationSet | None:
    """The pictures that a run was measured on, if they are still there."""
    parameters = require_run(run.run_id, "runs").data.params
    where: dict[str, str] = {name: parameters[name] for name in ("data_root", "eval_images") if name in parameters}
    try:
        settings = parse_settings(BaselineSettings, where)
        found = load_evaluation_set(settings.data_folder, settings.eval_images)
    except QuantrackError as error:
        say(f"no intervals between runs on {run.circumstances.pictures}: {error}")
        return None
    if found.digest != run.circumstances.evaluation_digest:
        say(
            f"no intervals between runs on {run.circumstances.pictures}: data_root={settings.data_root} "
            "has other pictures or boxes now"
        )
        return None
    return found
