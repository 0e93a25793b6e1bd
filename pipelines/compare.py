"""Several modes of one detector side by side: measure what is missing, then compare, report, log."""

from __future__ import annotations

from functools import partial

from baseline import baseline
from ptq import ptq

import quantrack.program  # noqa: F401
from quantrack.comparison.runs import comparable_groups
from quantrack.datasets.calibration import load_calibration_set
from quantrack.datasets.coco import load_evaluation_set
from quantrack.detector.load import load_detector
from quantrack.entry import run_entry_point
from quantrack.progress import say
from quantrack.settings import BaselineSettings, CompareSettings, PtqSettings
from quantrack.tracking.children import Children
from quantrack.tracking.compare import log_comparison, read_runs
from quantrack.tracking.log import log_inputs
from quantrack.tracking.run import name_run
from quantrack.tracking.run_digest import run_digest


def compare(settings: CompareSettings) -> None:
    """Measure several modes in nested runs (finished ones are reused), or take runs, and compare them."""
    children = Children()
    groups = comparable_groups(read_runs(settings.run_ids or measure_modes(settings, children)))
    runs = [run for group in groups for run in group.runs]
    models = sorted({run.model for run in runs})
    name_run(f"compare-{len(runs)}-{'-'.join(models)}")
    log_comparison(groups, f"{', '.join(models)}: {len(runs)} runs compared")
    for group in groups:
        if len(groups) > 1:
            say(f"on {group.circumstances.text}:")
        for run in group.runs:
            say(f"{run.label}: mAP50-95 {run.metrics['mAP50-95']:.4f}")
    children.require_all_finished()


def measure_modes(settings: CompareSettings, children: Children) -> tuple[str, ...]:
    """The run of each mode: one that measured just this before, or a new nested one."""
    evaluation_set = load_evaluation_set(settings.data_folder, settings.eval_images)
    by_mode = {mode: settings.child(mode) for mode in settings.mode_names}
    calibration = None
    if any(isinstance(child, PtqSettings) for child in by_mode.values()):
        calibration = load_calibration_set(
            settings.calibration_list, settings.calib_images, settings.data_folder, settings.seed
        )
    detector = load_detector(settings.model, settings.head, settings.imgsz, settings.seed, settings.trust_checkpoint)
    name_run(f"compare-{len(settings.mode_names)}-{detector.name}")
    log_inputs(evaluation_set, calibration)
    for mode, child in by_mode.items():
        if isinstance(child, BaselineSettings):
            digest = run_digest(child, detector, evaluation_set, None)
            children.find_or_run(mode, "baseline", child, digest, partial(baseline, child))
        else:
            digest = run_digest(child, detector, evaluation_set, calibration)
            children.find_or_run(mode, "ptq", child, digest, partial(ptq, child))
    return children.run_ids


if __name__ == "__main__":
    run_entry_point("compare", CompareSettings, compare)
