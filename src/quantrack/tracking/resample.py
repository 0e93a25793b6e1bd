"""Hold runs against each other over resampled pictures, from the detections that they logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from quantrack.comparison.runs import ComparedRun
from quantrack.datasets.coco import EvaluationSet, load_evaluation_set
from quantrack.errors import QuantrackError
from quantrack.evaluation.bootstrap import LEAST_PICTURES, BootstrapSettings, resampled_map
from quantrack.evaluation.coco_metrics import detections_from_json
from quantrack.progress import say
from quantrack.settings import BaselineSettings, parse_settings
from quantrack.tracking.read import has_artifact, read_json, require_run

DETECTIONS = "detections.json"


def resampled_runs(runs: Sequence[ComparedRun]) -> tuple[ComparedRun, ...]:
    """The runs, those measured alike with their mAP on resampled pictures.

    The pictures are read where one of the runs on them read them; where they are no longer there as they were, that
    is said, and the runs stay as they are.
    """
    alike = Counter(run.circumstances for run in runs)
    known = [run for run in runs if alike[run.circumstances] > 1 and has_artifact(run.run_id, DETECTIONS)]
    sets, ids = _evaluation_sets(known), {run.run_id for run in known}
    return tuple(
        _resampled(run, sets[run.circumstances.evaluation_digest]) if run.run_id in ids else run for run in runs
    )


def _resampled(run: ComparedRun, evaluation_set: EvaluationSet | None) -> ComparedRun:
    if evaluation_set is None or len(evaluation_set.pictures) < LEAST_PICTURES:
        return run
    detections = detections_from_json(read_json(run.run_id, DETECTIONS))
    return replace(run, resampled=resampled_map(evaluation_set, detections, BootstrapSettings()))


def _evaluation_sets(runs: Sequence[ComparedRun]) -> dict[str, EvaluationSet | None]:
    """By digest, the pictures that runs were measured on; None where they are nowhere as they were, which is said."""
    sets: dict[str, EvaluationSet | None] = {}
    for digest in {run.circumstances.evaluation_digest for run in runs}:
        measured = [run for run in runs if run.circumstances.evaluation_digest == digest]
        places = dict.fromkeys(_place(run) for run in measured)
        tried = [_read(data_root, eval_images, digest) for data_root, eval_images in places]
        found = [one for one in tried if isinstance(one, EvaluationSet)]
        sets[digest] = found[0] if found else None
        if not found:
            say(f"no intervals between runs on {measured[0].circumstances.pictures}: {tried[0]}")
    return sets


def _place(run: ComparedRun) -> tuple[str, str]:
    """A run's `data_root` and `eval_images`."""
    parameters = require_run(run.run_id, "runs").data.params
    return parameters.get("data_root", ""), parameters.get("eval_images", "")


def _read(data_root: str, eval_images: str, digest: str) -> EvaluationSet | str:
    """The pictures of this digest, or why they are not there."""
    try:
        settings = parse_settings(BaselineSettings, {"data_root": data_root, "eval_images": eval_images})
        found = load_evaluation_set(settings.data_folder, settings.eval_images)
    except (QuantrackError, OSError) as error:
        return str(error)
    return found if found.digest == digest else f"data_root={data_root} has other pictures or boxes now"
