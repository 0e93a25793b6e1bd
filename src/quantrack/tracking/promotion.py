"""Read the runs that may be promoted, and log what was decided about them to the active run."""

from __future__ import annotations

from collections.abc import Sequence

import mlflow
from mlflow.entities import Run

from quantrack.comparison.gates import CONTRACT, IDENTITY, Champion, MeasuredRun, Verdict
from quantrack.comparison.model_card import Measurement
from quantrack.comparison.runs import AGREEMENT, COMPARED
from quantrack.errors import QuantrackError
from quantrack.progress import say
from quantrack.tracking.log import log_description, log_json
from quantrack.tracking.models import models_of_run
from quantrack.tracking.read import BASELINE_TAG, active_run_id, evaluation_name, find_run, read_json, require_run
from quantrack.tracking.registry import Move

QUANTIZING = ("ptq", "qat")  # entry points whose runs hold a quantized model
VERSION_TAGS = (*IDENTITY, "git_commit", BASELINE_TAG)


def read_candidates(run_id: str, parent_id: str) -> tuple[MeasuredRun, ...]:
    """The run of an id, or the finished ptq and qat runs of a parent: those it compared, else those nested in it.

    Raises:
        QuantrackError: there is no such run, or the parent has no finished ptq or qat run.
    """
    if run_id:
        return (_measured(require_run(run_id, "run_id")),)
    parent = require_run(parent_id, "from")
    if parent.data.tags.get("entry_point") in QUANTIZING:  # nested in a training is its start, which nobody asked for
        raise QuantrackError(f"from={parent_id}: is itself a ptq or qat run; give it as run_id")
    if COMPARED in parent.data.tags:
        runs = _those_left(parent.data.tags[COMPARED])
    else:
        runs = mlflow.search_runs(
            experiment_ids=[parent.info.experiment_id],
            filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
            output_format="list",
        )
    wanted = [run for run in runs if run.info.status == "FINISHED" and run.data.tags.get("entry_point") in QUANTIZING]
    if not wanted:
        raise QuantrackError(
            f"from={parent_id}: no finished ptq or qat run among its runs; give a compare run, or run_id"
        )
    return tuple(_measured(run) for run in wanted)


def _those_left(compared: str) -> list[Run]:
    """The compared runs that were not deleted since."""
    found = {run_id: find_run(run_id) for each in compared.split(",") if (run_id := each.strip())}
    for run_id in (run_id for run_id, run in found.items() if run is None):
        say(f"run {run_id} was compared, and is deleted now; going on without it")
    return [run for run in found.values() if run is not None]


def _measured(run: Run) -> MeasuredRun:
    baseline_id = run.data.tags.get(BASELINE_TAG)
    baseline = find_run(baseline_id) if baseline_id else None
    models = models_of_run(run.info.experiment_id, run.info.run_id)
    ready = tuple(model.model_id for model in models if str(model.status) == "READY")
    return _facts(run, ready, None if baseline is None else _facts(baseline, (), None))


def _facts(run: Run, model_ids: tuple[str, ...], baseline: MeasuredRun | None) -> MeasuredRun:
    info, data = run.info, run.data
    name = info.run_name or info.run_id
    return MeasuredRun(info.run_id, name, info.status, dict(data.metrics), dict(data.tags), model_ids, baseline)


def read_measurement(run: MeasuredRun) -> Measurement:
    """What the model card says beside metrics and tags, from the run's inputs and artifacts.

    Raises:
        QuantrackError: an artifact that every ptq and qat run logs is not there.
    """
    found = mlflow.get_run(run.run_id)
    calibration, environment = read_json(run.run_id, "calibration.json"), read_json(run.run_id, "environment.json")
    return Measurement(
        pictures=evaluation_name(found),
        timed_runs=found.data.params.get("latency_runs", "an unknown number of"),
        calibration_pictures=int(calibration["images"]),
        calibration_seed=int(calibration["seed"]),
        versions=dict(environment["versions"]),
    )


def version_tags(run: MeasuredRun) -> dict[str, str]:
    """What a version says of itself: identity, figures in full, the run and the promotion it came from."""
    figures = {name: repr(run.metrics[name]) for name in (*CONTRACT, AGREEMENT) if name in run.metrics}
    identity = {name: run.tags[name] for name in VERSION_TAGS if name in run.tags}
    origin = {"run_id": run.run_id, "promotion_run_id": active_run_id()}
    first = {name: identity[name] for name in ("mode", "recipe")}  # the UI shows tags in this order
    return first | figures | identity | origin


def log_verdicts(verdicts: Sequence[Verdict], champion: Champion | None, off: Sequence[str]) -> None:
    """`gates.json`: each gate of each run with value, limit and outcome; a table as the run's description."""
    log_json(
        {
            "champion": None if champion is None else champion.version,
            "off": list(off),
            "runs": [
                {
                    "run_id": verdict.run.run_id,
                    "name": verdict.run.name,
                    "passed": verdict.passed,
                    "gates": [vars(gate) for gate in verdict.gates],
                }
                for verdict in verdicts
            ],
        },
        "gates.json",
    )
    lines = ["| run | gate | value | limit | passed |", "| --- | --- | ---: | ---: | --- |"]
    for verdict in verdicts:
        for gate in verdict.gates:
            outcome = "yes" if gate.passed else "no"
            lines.append(
                f"| {verdict.run.label} | {gate.gate} | {_cell(gate.value)} | {_cell(gate.limit)} | {outcome} |"
            )
    log_description("\n".join(lines), "gates.json")


def _cell(value: float | str | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value or "-")


def log_promotion(name: str, run: MeasuredRun, version: str, card: str) -> None:
    """Link the active run to what it promoted, and keep the model card."""
    mlflow.log_text(card, "model_card.md")
    mlflow.set_tags({"registered_model": name, "promoted_run_id": run.run_id, "model_version": version})


def log_move(name: str, move: Move) -> None:
    """Where `champion` and `previous` point now."""
    mlflow.set_tags({"registered_model": name, "champion_version": move.champion, "move": move.kind})
    if move.previous is not None:
        mlflow.set_tag("previous_version", move.previous)
