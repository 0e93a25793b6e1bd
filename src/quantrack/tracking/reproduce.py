"""Read a finished run's record, so that it can be done again, and compare what came of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import mlflow
from mlflow.entities import Run

from quantrack.comparison.runs import ACCURACY, AGREEMENT
from quantrack.errors import QuantrackError
from quantrack.files import file_digest
from quantrack.progress import say
from quantrack.quantization.recipe import RECIPES
from quantrack.settings import BaselineSettings, OnnxSettings, PtqSettings, QatSettings, SharedSettings, parse_settings
from quantrack.tracking.log import log_json
from quantrack.tracking.models import VERSION_TAG, fetch
from quantrack.tracking.read import BASELINE_TAG, read_json, require_run
from quantrack.tracking.training import START_TAG

SETTINGS: dict[str, type[SharedSettings]] = {
    "baseline": BaselineSettings,
    "ptq": PtqSettings,
    "qat": QatSettings,
    "evaluate": OnnxSettings,
}
ONNX_DIGEST = "onnx_digest"
DIGESTS = (
    "model_digest",
    "evaluation_digest",
    "calibration_digest",
    "training_digest",
    "validation_digest",
    ONNX_DIGEST,
)
CONTEXT = ("git_commit", "device_name", "provider", BASELINE_TAG)  # tags
ENVIRONMENT = ("versions", "torch_threads")  # of environment.json
# What depends on the clock, on the machine's load or on what an earlier run has left behind.
TIMINGS = re.compile(r"latency|seconds|steps_from_cache|peak_rss|busy_cores|nodes_on_")


@dataclass(frozen=True)
class Record:
    """A finished run, the settings that it ran with, what came of it and on what."""

    run: Run
    entry_point: str
    settings: SharedSettings
    facts: Mapping[str, str]
    environment: Mapping[str, object]


def read_record(run_id: str, data_root: str, folder: Path) -> Record:
    """The record of a run; a recipe or plan of its own is fetched into `folder` and used as it was logged.

    `data_root` says where the pictures lie now; empty means where they lay.

    Raises:
        QuantrackError: there is no such finished run, or it is of an entry point that is not reproduced.
    """
    run = require_run(run_id, "run_id")
    entry = run.data.tags.get("entry_point", "")
    if entry not in SETTINGS or run.info.status != "FINISHED":
        raise QuantrackError(
            f"run_id={run_id}: a {run.info.status} run of {entry or 'something else'}; "
            f"give a finished run of {', '.join(SETTINGS)}"
        )
    known = {item.name for item in fields(SETTINGS[entry])}
    texts = {name: value for name, value in run.data.params.items() if name in known}
    if entry == "qat":
        texts = _from_the_same_start(run, texts)
    else:
        texts |= _recorded_files(run, texts, folder)
    if VERSION_TAG in run.data.tags:  # what an alias stood for then
        texts["onnx"] = run.data.tags[VERSION_TAG]
    texts |= {"data_root": data_root} if data_root else {}
    return Record(run, entry, parse_settings(SETTINGS[entry], texts), facts(run), _environment(run))


def _from_the_same_start(run: Run, texts: Mapping[str, str]) -> dict[str, str]:
    """Training starts again from the same PTQ run, which is not done again; its recipe and bits come with it."""
    of_the_start = {"recipe", "plan", "avg_bits", "plan_bits", "plan_by", "resume"}
    return {name: text for name, text in texts.items() if name not in of_the_start} | {
        "from_run": run.data.tags[START_TAG]
    }


def _recorded_files(run: Run, texts: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Settings that named what may have changed since, as paths of what the run has logged."""
    found = {}
    if texts.get("recipe"):
        logged = fetch(f"runs:/{run.info.run_id}/recipe.yaml", "recipe", folder)
        name = run.data.tags["recipe"]
        if name not in RECIPES or _steps_now(texts) != logged.read_text(encoding="utf-8"):
            found["recipe"] = str(logged.rename(folder / f"{name}.yaml"))
    if texts.get("plan", "").strip("'\""):
        found["plan"] = str(fetch(f"runs:/{run.info.run_id}/plan.json", "plan", folder))
    return found


def _steps_now(texts: Mapping[str, str]) -> str:
    """What one of our recipes comes to today with a run's mode, bits and variant."""
    return parse_settings(PtqSettings, texts).chosen_recipe.text()


@dataclass(frozen=True)
class Difference:
    """One figure or digest that is not what it was; None where one of the runs lacks it."""

    name: str
    before: str | None
    now: str | None

    @property
    def text(self) -> str:
        return f"{self.name} was {self.before}, is {self.now}"


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[Difference, ...]:
    """What differs between the facts of two runs, by name."""
    names = sorted(before.keys() | now.keys())
    pairs = [Difference(name, before.get(name), now.get(name)) for name in names]
    return tuple(pair for pair in pairs if pair.before != pair.now)


def facts(run: Run) -> dict[str, str]:
    """What must come out again, as texts: metrics (but for timings), digests, and the ONNX files' bytes."""
    metrics = {name: repr(value) for name, value in run.data.metrics.items() if not TIMINGS.search(name)}
    digests = {name: run.data.tags[name] for name in DIGESTS if name in run.data.tags}
    return metrics | digests | _file_digests(run.info.run_id)


def _file_digests(run_id: str) -> dict[str, str]:
    """Digests of a run's ONNX files, by artifact path."""
    client = mlflow.MlflowClient()
    paths = [entry.path for entry in client.list_artifacts(run_id, "onnx") if entry.path.endswith(".onnx")]
    with tempfile.TemporaryDirectory() as folder:
        return {path: file_digest(Path(client.download_artifacts(run_id, path, folder))) for path in paths}


def log_reproduction(record: Record, again_id: str) -> tuple[Difference, ...]:
    """`reproduction.json`: what differs and on what both ran; the number of differences as a metric."""
    again = require_run(again_id, "again")
    before, now = dict(record.facts), facts(again)
    for name in (ONNX_DIGEST, AGREEMENT):
        if name not in before:  # a record of before it was logged
            now.pop(name, None)
    reasons = _not_compared(record, again, before.keys() | now.keys())
    for reason, names in reasons.items():
        say(f"{reason}; not compared: {', '.join(names)}")
    not_compared = sorted(name for names in reasons.values() for name in names)
    before, now = ({name: text for name, text in each.items() if name not in not_compared} for each in (before, now))
    found = differences(before, now)
    context: dict[str, object] = {
        name: {"before": record.run.data.tags.get(name), "now": again.data.tags.get(name)} for name in CONTEXT
    }
    recorded = {"before": record.environment, "now": _environment(again)}
    for name in ENVIRONMENT:
        context[name] = {when: of.get(name) for when, of in recorded.items()}
    log_json(
        {
            "run": record.run.info.run_id,
            "again": again_id,
            "equal": not found,
            "compared": len(before.keys() | now.keys()),
            "not_compared": not_compared,
            "differences": [vars(one) for one in found],
            "context": context,
        },
        "reproduction.json",
    )
    mlflow.log_metrics({"differences": float(len(found))})
    mlflow.set_tags({"reproduced_run_id": record.run.info.run_id, "again_run_id": again_id})
    return found


def _from_one_baseline(record: Record, again: Run) -> bool:
    """Whether both were held against one float32 run; `evaluate` takes the newest there is, others their own."""
    then, now = (run.data.tags.get(BASELINE_TAG) for run in (record.run, again))
    return record.entry_point != "evaluate" or (then is not None and then == now)


def _not_compared(record: Record, again: Run, names: Iterable[str]) -> dict[str, list[str]]:
    """What must differ although the same was done, by why."""
    left_out = {}
    if not _from_one_baseline(record, again):
        held = sorted(name for name in names if name.startswith((f"{ACCURACY}_drop", AGREEMENT)))
        left_out["not held against the float32 baseline of then, as far as is known"] = held
    if record.run.data.tags.get("recipe") != again.data.tags.get("recipe"):  # and files carry its name
        recipe = record.run.data.tags.get("recipe")
        files = sorted(name for name in names if name.startswith("onnx"))
        left_out[f"recipe={recipe} has other steps by now, so the recorded ones ran under another name"] = files
    return {reason: listed for reason, listed in left_out.items() if listed}


def _environment(run: Run) -> Mapping[str, object]:
    return read_json(run.info.run_id, "environment.json")
