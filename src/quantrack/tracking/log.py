"""Write a run's results to MLflow: flat metric names shared by every entry point."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import mlflow
import pandas as pd
import yaml
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

from quantrack.comparison.fitting import fitting
from quantrack.datasets.calibration import CalibrationSet
from quantrack.datasets.coco import EvaluationSet
from quantrack.datasets.download import PreparedData
from quantrack.evaluation.coco_metrics import detections_json
from quantrack.evaluation.measure import Proof, Speed
from quantrack.evaluation.plots import (
    per_class_ap_figure,
    placement_figure,
    precision_recall_figure,
    sensitivity_figure,
)
from quantrack.evaluation.samples import choose_samples, sample_picture
from quantrack.evaluation.types import Detection
from quantrack.onnx.exported_files import ExportedFiles
from quantrack.progress import say
from quantrack.quantization.bit_plan import BitPlan
from quantrack.quantization.insert_quantizers import average_stored_bits, average_weight_bits
from quantrack.quantization.job import QuantizationJob, StepReport
from quantrack.quantization.recipe import Recipe
from quantrack.quantization.report import calibration_record, layer_records
from quantrack.quantization.sensitivity import LayerSensitivity
from quantrack.settings import SharedSettings, setting_texts
from quantrack.tracking.environment import device_name, environment_record
from quantrack.tracking.read import active_run_id, has_artifact
from quantrack.tracking.run import log_new_parameters, name_run

DIGEST_LENGTH = 32  # MLflow keeps 36 characters at most


def evaluation_dataset(evaluation_set: EvaluationSet) -> MetaDataset:
    """The evaluation pictures as an MLflow dataset with our digest."""
    return _dataset(evaluation_set.root, evaluation_set.name, evaluation_set.digest)


def log_inputs(evaluation_set: EvaluationSet, calibration: CalibrationSet | None) -> None:
    """Log what was read, so that runs are compared only where it is the same."""
    mlflow.log_input(evaluation_dataset(evaluation_set), context="evaluation")
    mlflow.set_tag("evaluation_digest", evaluation_set.digest)
    if calibration is not None:
        mlflow.log_input(
            _dataset(calibration.paths[0].parent, calibration.name, calibration.digest), context="calibration"
        )
        mlflow.set_tag("calibration_digest", calibration.digest)


def log_dataset(folder: Path, name: str, digest: str, context: str) -> None:
    """Log further pictures that were read, and what for."""
    mlflow.log_input(_dataset(folder, name, digest), context=context)


def _dataset(folder: Path, name: str, digest: str) -> MetaDataset:
    return MetaDataset(LocalArtifactDatasetSource(folder.resolve().as_uri()), name=name, digest=digest[:DIGEST_LENGTH])


def log_settings(settings: SharedSettings, run_name: str, resolved: Mapping[str, object] | None = None) -> None:
    """`config.yaml`: the settings, and what `auto` and the like came to; names and parameters the run."""
    texts = setting_texts(settings)
    came_to = {"data_root": str(settings.data_folder), "calib_list": settings.calibration_list, **(resolved or {})}
    log_new_parameters(texts | {f"{name}_resolved": str(value) for name, value in came_to.items()})
    mlflow.log_text(yaml.safe_dump({"settings": texts, "resolved": came_to}, sort_keys=False), "config.yaml")
    name_run(run_name)


def log_quantization(job: QuantizationJob, reports: Sequence[StepReport], weight_storage: str) -> dict[str, float]:
    """`calibration.json` and `layers.json`; returns the metrics of the quantization itself."""
    log_json(calibration_record(job, reports), "calibration.json")
    log_json(layer_records(job), "layers.json")
    if job.plan is not None:
        log_json(job.plan.record(), "plan.json")
    stored = average_stored_bits(job.model, weight_storage)
    return {"weight_bits_avg": average_weight_bits(job.model), "weight_bits_stored_avg": stored}


def step_totals(reports: Sequence[StepReport]) -> dict[str, float]:
    """How long a recipe's steps took together, and how many of them the cache had."""
    cached = float(sum(report.cached for report in reports))
    return {"steps_from_cache": cached, "quantize_seconds": sum(report.seconds for report in reports)}


def log_recipe(recipe: Recipe) -> None:
    """`recipe.yaml`: every step with every setting, as `-P recipe=` reads it again."""
    mlflow.log_text(recipe.text(), "recipe.yaml")


def log_step(place: int, report: StepReport) -> None:
    """A finished step's time and figures, grouped in the UI under `steps`."""
    prefix = f"steps/{place:02d}_{report.step}"
    figures = {"seconds": report.seconds, **report.figures}
    mlflow.log_metrics({f"{prefix}/{name}": value for name, value in figures.items()})


def log_sensitivity(rows: Sequence[LayerSensitivity], plan: BitPlan, unit: str) -> None:
    """`sensitivity.json` (a table), `plan.json` for `ptq -P plan=`, a plot, and what the plan comes to."""
    bits = sorted(rows[0].errors)
    table: dict[str, list[object]] = {
        "layer": [row.name for row in rows],
        "role": [row.role.value for row in rows],
        "weights": [row.weights for row in rows],
        **{f"error at {each} bits": [row.errors[each] for row in rows] for each in bits},
        "planned bits": [plan.average(row.name) for row in rows],
    }
    log_table(table, "sensitivity.json")
    log_json(plan.record(), "plan.json")
    mlflow.log_figure(sensitivity_figure(rows, plan, unit), "plots/sensitivity.png")
    weights = sum(row.weights for row in rows)
    metrics = {
        "weight_bits_avg": sum(plan.average(row.name) * row.weights for row in rows) / weights,
        "planned_error": sum(row.planned_error(plan.bits[row.name]) for row in rows),
        "error_at_fewest_bits": sum(row.errors[bits[0]] for row in rows),
    }
    mlflow.log_metrics(metrics)
    told = f"{metrics['weight_bits_avg']:.2f} bits on average in {len(rows)} layers, estimated error "
    told += f"{metrics['planned_error']:.3g} ({metrics['error_at_fewest_bits']:.3g} with {bits[0]} bits throughout)"
    say(f"sensitivity: {told}; take it with -P plan=runs:/{active_run_id()}/plan.json")


def log_table(table: Mapping[str, Sequence[object]], name: str) -> None:
    """A table that the UI shows; MLflow's own function adds rows to one that an interrupted attempt has logged."""
    if has_artifact(active_run_id(), name):
        mlflow.log_text(pd.DataFrame(table).to_json(orient="split", index=False), name)
    else:
        mlflow.log_table(dict(table), name)


def log_files(files: ExportedFiles) -> None:
    """Both ONNX files, and the node counts before and after clean-up."""
    for path in (files.plain, files.optimized):
        mlflow.log_artifact(str(path), "onnx")
    log_json({"exported": files.plain_nodes, "cleaned": files.optimized_nodes}, "nodes.json")


def log_json(content: object, name: str) -> None:
    """A JSON artifact."""
    mlflow.log_text(json.dumps(content, indent=2) + "\n", name)


def log_proof(proof: Proof, evaluation_set: EvaluationSet) -> None:
    """Detections, per-class table, plots and environment of one measured file."""
    log_provider(proof.speed.provider)
    log_speed(proof.speed)
    log_json(proof.coco.metrics, "coco_metrics.json")
    # on one line, which saves a quarter: 5,000 pictures have 1.5 million rows
    mlflow.log_text(json.dumps(detections_json(proof.detections)) + "\n", "detections.json")
    rows = [row for row in proof.coco.classes if row.ap50_95 is not None]
    table: dict[str, Sequence[object]] = {
        "class": [row.name for row in rows],
        "AP50-95": [row.ap50_95 for row in rows],
        "AP50": [row.ap50 for row in rows],
        "boxes": [row.boxes for row in rows],
    }
    log_table(table, "per_class_ap.json")
    title = f"{evaluation_set.name}, mAP50-95 {proof.coco.metrics['mAP50-95']:.3f}"
    mlflow.log_figure(precision_recall_figure(proof.coco, title), "plots/precision_recall.png")
    mlflow.log_figure(per_class_ap_figure(proof.coco, title), "plots/per_class_ap.png")


def log_speed(speed: Speed) -> None:
    """The session's settings, and which provider ran what for how long, as `placement.json` and a plot."""
    mlflow.set_tag("session_settings", speed.session_settings)
    log_json(speed.session.record(), "session.json")
    log_json(speed.placement.record(), "placement.json")
    mlflow.log_figure(placement_figure(speed.placement), "plots/placement.png")


def log_provider(provider: str) -> None:
    """Which provider ran on which processor, and the versions."""
    mlflow.set_tags({"provider": provider, "device_name": device_name(provider)})
    log_json(environment_record(provider), "environment.json")


def log_description(text: str, artifact: str) -> None:
    """The active run's description, at most as long as MLflow keeps it; the artifact of that name has all."""
    mlflow.set_tag("mlflow.note.content", fitting(text, artifact, MAX_TAG_VAL_LENGTH))


def log_samples(
    evaluation_set: EvaluationSet,
    float_detections: Sequence[Detection] | None,
    detections: Sequence[Detection],
) -> None:
    """Sample pictures with true, float and quantized boxes side by side."""
    with tempfile.TemporaryDirectory() as folder:
        for picture in choose_samples(evaluation_set):
            panels = sample_picture(
                picture, evaluation_set.boxes, float_detections, detections, evaluation_set.categories
            )
            # least compression: a third of the time of `mlflow.log_image`, files a tenth larger
            _, content = cv2.imencode(".png", panels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
            Path(folder, f"{picture.id:012d}.png").write_bytes(content.tobytes())  # raises; `imwrite` may not
        mlflow.log_artifacts(folder, "samples")


def log_prepared_data(prepared: PreparedData) -> None:
    """How many pictures are there, and how many of them this run fetched."""
    name_run("data")
    mlflow.log_metrics(
        {
            "pictures": float(prepared.pictures),
            "pictures_downloaded": float(prepared.downloaded),
            "pictures_reused": float(prepared.reused),
            "downloaded_mb": prepared.bytes_downloaded / 1_000_000,
        }
    )
    say(f"data: {prepared.pictures} pictures are there, {prepared.downloaded} of them new")
