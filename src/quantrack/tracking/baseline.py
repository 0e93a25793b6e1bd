"""The float baseline: measured by its own entry point, and found again (or made) by all others."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow

from quantrack.comparison.runs import ACCURACY, AGREEMENT, LATENCY_RATIO, ComparisonKey
from quantrack.datasets.coco import EvaluationSet
from quantrack.detector.device import resolve_device
from quantrack.detector.load import Detector
from quantrack.evaluation.agreement import agreement
from quantrack.evaluation.bootstrap import paired_drop_interval
from quantrack.evaluation.coco_metrics import detections_from_json, drop_points
from quantrack.evaluation.measure import Proof, prove
from quantrack.evaluation.types import Detection
from quantrack.onnx.exported_files import export_float_files
from quantrack.progress import say
from quantrack.runtime.parity import torch_network
from quantrack.runtime.session import Session, open_session, resolve_provider
from quantrack.settings import BaselineSettings, setting_texts
from quantrack.tracking.environment import device_name
from quantrack.tracking.log import log_inputs, log_samples
from quantrack.tracking.models import fetch_onnx
from quantrack.tracking.read import BASELINE_TAG, active_run_id, finished_runs, has_artifact, read_json
from quantrack.tracking.result import comparison_key, detector_facts, log_result
from quantrack.tracking.run import log_new_parameters, name_run, tracked_run
from quantrack.tracking.run_digest import SOFTWARE, log_run_digest, software_digest

FLOAT_RECIPE = "float"
OWN_REFERENCE = {f"{ACCURACY}_drop": 0.0, LATENCY_RATIO: 1.0, AGREEMENT: 1.0}  # float32 held against itself


@dataclass(frozen=True)
class Baseline:
    """The float32 result that another one is held against."""

    run_id: str
    metrics: Mapping[str, float]
    detections: Sequence[Detection]

    def open(self, provider: str, folder: Path) -> Session:
        """The baseline's file, to be timed in turns with another; it is copied to `folder`."""
        return open_session(fetch_onnx(f"runs:/{self.run_id}/onnx", folder, "baseline"), provider)

    def compared(self, proof: Proof, evaluation_set: EvaluationSet) -> dict[str, float]:
        """What another result has lost, and how closely it follows; absent where there is nothing to measure it by.

        `mAP50-95_drop` in points and its 95 % interval; `float32_agreement`, which needs no labels.
        """
        alike = agreement(evaluation_set, self.detections, proof.detections)
        without_labels = {} if alike is None else {AGREEMENT: alike}
        if ACCURACY not in proof.coco.metrics or ACCURACY not in self.metrics:
            return without_labels
        drop = drop_points(self.metrics[ACCURACY], proof.coco.metrics[ACCURACY])
        interval = paired_drop_interval(evaluation_set, self.detections, proof.detections)
        return {f"{ACCURACY}_drop": drop} | interval.metrics() | without_labels


def measure_baseline(
    detector: Detector, evaluation_set: EvaluationSet, settings: BaselineSettings, reference: Baseline | None
) -> tuple[Baseline, Proof]:
    """Export the float detector in the precision of the settings, prove it, log it in the active run.

    `reference` is the float32 baseline that another precision is held against.
    """
    device = resolve_device(settings.device)
    model = copy.deepcopy(detector.model).to(device)  # the detector stays where it is
    facts = detector_facts(detector, evaluation_set, settings.imgsz, settings.precision, FLOAT_RECIPE)
    log_inputs(evaluation_set, None)
    # so that the UI's axes and columns of modes and recipes hold the baselines as well
    log_new_parameters({"mode": facts.mode, "recipe": facts.recipe, "device_resolved": str(device)})
    with tempfile.TemporaryDirectory() as folder:
        files = export_float_files(model, facts, Path(folder))
        session = open_session(files.optimized, settings.provider)
        beside = reference.open(settings.provider, Path(folder) / "float32") if reference else None
        proof = prove(session, evaluation_set, facts.head, settings.latency_runs, torch_network(model), beside)
        further = reference.compared(proof, evaluation_set) if reference else OWN_REFERENCE
        metrics = log_result(files, facts, proof, evaluation_set, further)
    log_samples(evaluation_set, None, proof.detections)
    return Baseline(active_run_id(), metrics, proof.detections), proof


def find_baseline(key: ComparisonKey, further_tags: Mapping[str, str] | None = None) -> Baseline | None:
    """The newest finished float32 baseline of the same key in the active run's experiment, with what it logged."""
    for run in finished_runs({"entry_point": "baseline", "mode": "fp32", **key.tags(), **(further_tags or {})}):
        run_id = run.info.run_id
        if all(has_artifact(run_id, name) for name in ("detections.json", "onnx")):
            return Baseline(run_id, run.data.metrics, detections_from_json(read_json(run_id, "detections.json")))
        say(f"float32 baseline: what run {run_id} has logged is gone; not using it")
    return None


def find_or_measure_baseline(detector: Detector, evaluation_set: EvaluationSet, settings: BaselineSettings) -> Baseline:
    """Reuse the float32 baseline of this detector, processor and software, or measure it in a nested run.

    `settings` are those of the nested run.
    """
    provider = resolve_provider(settings.provider)
    facts = detector_facts(detector, evaluation_set, settings.imgsz, settings.precision, FLOAT_RECIPE)
    key = comparison_key(facts, evaluation_set, provider)
    baseline = find_baseline(key, {"device_name": device_name(provider), SOFTWARE: software_digest()})
    if baseline is not None:
        say(f"float32 baseline: reusing run {baseline.run_id}")
    else:
        say("float32 baseline: not in this experiment by this code yet; measuring it in a nested run")
        with tracked_run("baseline", setting_texts(settings), nested=True):
            name_run(f"baseline-fp32-{detector.name}")
            log_run_digest(settings, detector, evaluation_set, None)
            baseline, _ = measure_baseline(detector, evaluation_set, settings, None)
    log_baseline(baseline)
    return baseline


def log_baseline(baseline: Baseline) -> None:
    """Tag the active run with what it is held against."""
    mlflow.set_tag(BASELINE_TAG, baseline.run_id)
