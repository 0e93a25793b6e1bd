"""Log one measured export: what every entry point that exports or evaluates has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from quantrack.comparison.runs import ComparisonKey
from quantrack.datasets.coco import EvaluationSet
from quantrack.detector.load import Detector
from quantrack.errors import UsageError
from quantrack.evaluation.measure import Proof, Speed
from quantrack.onnx.exported_files import ExportedFiles, file_metrics
from quantrack.onnx.inspect import ModelFacts
from quantrack.runtime.machine_load import peak_memory_mb
from quantrack.runtime.tune import Trial
from quantrack.schemes import SCHEMES
from quantrack.settings import OnnxSettings
from quantrack.tracking.log import log_files, log_proof, log_provider, log_speed, log_table
from quantrack.tracking.models import log_model
from quantrack.tracking.read import current_run
from quantrack.tracking.run_digest import SOFTWARE, software_digest
from quantrack.tracking.summary import log_summary


def comparison_key(facts: ModelFacts, evaluation_set: EvaluationSet, provider: str) -> ComparisonKey:
    """The key of a file measured on a set with a provider."""
    return ComparisonKey(facts.model_digest, evaluation_set.digest, facts.head, facts.imgsz, provider)


def detector_facts(
    detector: Detector,
    evaluation_set: EvaluationSet,
    imgsz: int,
    mode: str,
    recipe: str,
) -> ModelFacts:
    """What an exported file of this detector, which has the classes of the set, will say of itself."""
    return ModelFacts(
        detector.name,
        detector.digest,
        detector.head,
        imgsz,
        mode,
        recipe,
        detector.class_names,
        category_ids=tuple(category.id for category in evaluation_set.categories),
    )


def log_result(
    files: ExportedFiles,
    facts: ModelFacts,
    proof: Proof,
    evaluation_set: EvaluationSet,
    further: Mapping[str, float],
) -> dict[str, float]:
    """Log the files, the proof, the LoggedModel, tags and summary; returns all metrics."""
    metrics = proof.metrics() | files.metrics() | dict(further) | _memory()
    log_files(files)
    log_proof(proof, evaluation_set)
    log_identity(facts, evaluation_set, proof.speed.provider)
    name = title(facts)
    log_model(files.optimized, name.replace(" ", "-"), metrics, evaluation_set)
    log_summary(name, measured_on(facts, evaluation_set, proof), metrics)
    return metrics


def _memory() -> dict[str, float]:
    """`peak_rss_mb`, absent in a nested run: the process has done the work of others as well."""
    nested = MLFLOW_PARENT_RUN_ID in current_run().data.tags
    return {} if nested else {"peak_rss_mb": peak_memory_mb()}


def resolved_by_file(settings: OnnxSettings, facts: ModelFacts) -> dict[str, object]:
    """What a given file decides, whatever the settings' defaults say.

    Raises:
        UsageError: another input size was asked for than the file has.
    """
    if settings.imgsz not in (OnnxSettings.imgsz, facts.imgsz):
        raise UsageError(f"imgsz={settings.imgsz}: {settings.onnx} takes {facts.imgsz}; leave imgsz out")
    return {"model": facts.model, "imgsz": facts.imgsz}


def log_evaluation(
    path: Path, facts: ModelFacts, proof: Proof, evaluation_set: EvaluationSet, further: Mapping[str, float]
) -> None:
    """Log the proof of a file that was exported elsewhere; the file itself is not logged again."""
    metrics = proof.metrics() | file_metrics(path) | dict(further)
    if facts.weight_bits_avg is not None:
        metrics["weight_bits_avg"] = facts.weight_bits_avg
    log_proof(proof, evaluation_set)
    mlflow.log_metrics(metrics)
    log_identity(facts, evaluation_set, proof.speed.provider)
    log_summary(title(facts), measured_on(facts, evaluation_set, proof), metrics)


def log_benchmark(path: Path, facts: ModelFacts, speed: Speed) -> None:
    """Log a file's speed and size; accuracy was not measured and is absent."""
    metrics = speed.metrics() | file_metrics(path)
    mlflow.log_metrics(metrics)
    log_provider(speed.provider)
    tags = {"model_digest": facts.model_digest, "mode": facts.mode, "recipe": facts.recipe}
    mlflow.set_tags(tags | {"model_name": facts.model, "imgsz": str(facts.imgsz), "head": facts.head})
    measured = {
        "input": f"{facts.imgsz} px",
        "provider": speed.provider,
        "timed runs": str(speed.latency.runs),
        "session": speed.session_settings,
    }
    log_speed(speed)
    log_summary(f"{title(facts)}: speed", measured, metrics)


def log_tuning(trials: Sequence[Trial]) -> None:
    """`tuning.json`, a table of session settings, the fastest first; the best ones as a tag."""
    table: dict[str, list[object]] = {
        "session": [trial.settings.text for trial in trials],
        "median ms": [round(trial.latency.p50, 3) for trial in trials],
        "from": [_rounded(trial.latency.low, 3) for trial in trials],
        "to": [_rounded(trial.latency.high, 3) for trial in trials],
        "times float32": [_rounded(trial.ratio.median if trial.ratio else None, 4) for trial in trials],
    }
    log_table(table, "tuning.json")
    mlflow.set_tag("best_session_settings", trials[0].settings.text)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def log_identity(facts: ModelFacts, evaluation_set: EvaluationSet, provider: str) -> None:
    """Tags to filter by, and those that say which runs may be compared."""
    key = comparison_key(facts, evaluation_set, provider)
    own = {"mode": facts.mode, "recipe": facts.recipe, "model_name": facts.model, SOFTWARE: software_digest()}
    mlflow.set_tags(key.tags() | own)
    if facts.mode in SCHEMES:
        mlflow.set_tags(asdict(facts.variant))


def title(facts: ModelFacts) -> str:
    """Model, mode, variant and recipe, for people."""
    return " ".join(word for word in (facts.model, facts.mode, *facts.variant.words, facts.recipe) if word)


def measured_on(facts: ModelFacts, evaluation_set: EvaluationSet, proof: Proof) -> dict[str, str]:
    """The circumstances that a number means nothing without."""
    return {
        "pictures": f"{evaluation_set.name} (digest {evaluation_set.digest[:12]})",
        "head": facts.head,
        "input": f"{facts.imgsz} px",
        "provider": proof.speed.provider,
        "timed runs": str(proof.speed.latency.runs),
        "session": proof.speed.session_settings,
    }
