"""`promote` as a user runs it, on a real run and on copies of its record."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pytest
from command import ROOT, newest_run, run_pipeline, use_store
from mlflow.entities import Run

from quantrack.files import file_digest

FILE = "small-w4a8-qcdq-ptq-opt.onnx"
LENIENT = ("--max-drop", "100")  # 12 pictures: the interval is wide


def promotion(folder: Path) -> Run:
    return newest_run(folder, "promote")


def aliases(name: str) -> dict[str, str]:
    found = mlflow.MlflowClient().get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


def is_registered(name: str) -> bool:
    return any(model.name == name for model in mlflow.MlflowClient().search_registered_models())


def gates(run: Run) -> dict[str, object]:
    content: dict[str, object] = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/gates.json"))
    return content


def copied(
    run: Run, folder: Path, name: str, metrics: Mapping[str, float] | None = None, tags: Mapping[str, str] | None = None
) -> Run:
    """Another run that says the same, in an experiment of its own: quicker than to quantize again."""
    use_store(folder)
    experiment = mlflow.get_experiment_by_name("copies")
    experiment_id = (
        experiment.experiment_id
        if experiment
        else mlflow.create_experiment("copies", artifact_location=(folder / "copies").as_uri())
    )
    own = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    with mlflow.start_run(experiment_id=experiment_id, run_name=name) as copy:
        mlflow.log_params(run.data.params)
        mlflow.log_metrics(run.data.metrics | dict(metrics or {}))
        mlflow.set_tags(own | dict(tags or {}))
        for artifact in ("calibration.json", "environment.json"):
            mlflow.log_text(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{artifact}"), artifact)
        mlflow.create_external_model(name="copy", source_run_id=copy.info.run_id)
    return mlflow.get_run(copy.info.run_id)


def test_a_run_that_passes_becomes_champion_once(ptq_run: Run, shared_store: Path) -> None:
    options = ("--name", "watch", "--run-id", ptq_run.info.run_id, *LENIENT)
    done = run_pipeline(shared_store, "promote", *options)
    assert done.returncode == 0, done.stderr
    assert "watch: champion is version 1 of ptq-w4a8-default-small" in done.stderr
    made = promotion(shared_store)
    assert made.info.status == "FINISHED"
    assert made.info.run_name == "promote-watch"
    assert made.data.params["run_id"] == ptq_run.info.run_id
    assert made.data.params["from"] == ""
    assert made.data.tags["promoted_run_id"] == ptq_run.info.run_id
    assert (made.data.tags["registered_model"], made.data.tags["model_version"]) == ("watch", "1")

    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("watch", "champion")
    for tag in ("mode", "recipe", "model_digest", "evaluation_digest", "head", "imgsz", "device_name", "git_commit"):
        assert version.tags[tag] == ptq_run.data.tags[tag]
    assert float(version.tags["mAP50-95"]) == ptq_run.data.metrics["mAP50-95"]
    assert version.run_id == ptq_run.info.run_id
    card = version.description
    assert "| mAP50-95 |" in card
    assert "- pictures: val12 (digest" in card
    assert card == mlflow.artifacts.load_text(f"runs:/{made.info.run_id}/model_card.md")

    again = run_pipeline(shared_store, "promote", *options)
    assert again.returncode == 0, again.stderr
    assert aliases("watch") == {"champion": "1"}
    assert len(client.search_model_versions("name = 'watch'")) == 1


def test_a_champion_is_scored_by_its_alias(ptq_run: Run, shared_store: Path) -> None:
    done = run_pipeline(shared_store, "promote", "--name", "scored", "--run-id", ptq_run.info.run_id, *LENIENT)
    assert done.returncode == 0, done.stderr
    for path in ("", f"/data/{FILE}"):
        onnx = f"models:/scored@champion{path}"
        done = run_pipeline(shared_store, "benchmark", "--onnx", onnx, "--latency-runs", "2")
        assert done.returncode == 0, done.stderr
        assert "latency_ratio" in newest_run(shared_store, "benchmark").data.metrics  # its run's float32 file was found
    tags = newest_run(shared_store, "benchmark").data.tags  # the alias may move
    assert tags["onnx_version"] == f"models:/scored/1/data/{FILE}"
    with tempfile.TemporaryDirectory() as folder:
        file = mlflow.artifacts.download_artifacts(f"runs:/{ptq_run.info.run_id}/onnx/{FILE}", dst_path=folder)
        assert tags["onnx_digest"] == file_digest(Path(file))


def test_a_refusal_names_each_gate_and_leaves_the_registry_alone(ptq_run: Run, shared_store: Path) -> None:
    done = run_pipeline(
        shared_store, "promote", "--name", "refused", "--run-id", ptq_run.info.run_id,
        "--max-mb", "0.2", "--min-mAP", "0.99", "--min-agreement", "0.9999", "--max-latency-ratio", "0.001", *LENIENT,
    )  # fmt: skip
    assert done.returncode == 1
    refusal = promotion(shared_store)
    assert refusal.info.status == "FAILED"
    reason = refusal.data.tags["failure_reason"]
    assert f"error: {reason}" in done.stderr.splitlines()
    assert reason.startswith("refused: max_latency_ratio: latency_ratio to float32, timed in turns, is ")
    size, accuracy = ptq_run.data.metrics["onnx_mb"], ptq_run.data.metrics["mAP50-95"]
    assert f"; max_mb: onnx_mb is {size:.6g}, limit 0.2; min_mAP: mAP50-95 is {accuracy:.6g}, limit 0.99; " in reason
    assert reason.endswith(f"float32_agreement is {ptq_run.data.metrics['float32_agreement']:.6g}, limit 0.9999")
    assert not is_registered("refused")
    assert {gate["gate"]: gate["passed"] for gate in gates(refusal)["runs"][0]["gates"]} == {  # type: ignore[index]
        "finished": True, "logged_model": True, "metrics": True, "tags": True, "max_drop": True,
        "max_latency_ratio": False, "max_mb": False, "min_mAP": False,
        "min_agreement": False, "max_parity": True,
    }  # fmt: skip
    assert gates(refusal)["off"] == ["same_evaluation", "require_better"]


def test_better_run_then_rollback(ptq_run: Run, shared_store: Path) -> None:
    better = copied(ptq_run, shared_store, "better", {"mAP50-95": 0.9}, {"model_digest": "another"})
    for run in (ptq_run, better):
        done = run_pipeline(shared_store, "promote", "--name", "rolling", "--run-id", run.info.run_id, *LENIENT)
        assert done.returncode == 0, done.stderr
    assert "rolling: not the checkpoint of the champion, version 1" in done.stderr
    assert aliases("rolling") == {"champion": "2", "previous": "1"}

    worse = ("--name", "rolling", "--run-id", ptq_run.info.run_id, "--require-better", "true", *LENIENT)
    done = run_pipeline(shared_store, "promote", *worse)
    assert done.returncode == 1
    assert "refused: require_better: mAP50-95 against the champion's (version 2)" in done.stderr
    assert aliases("rolling") == {"champion": "2", "previous": "1"}

    done = run_pipeline(shared_store, "promote", "--name", "rolling", "--rollback", "true")
    assert done.returncode == 0, done.stderr
    assert "rolling: champion is version 1 again, previous 2" in done.stderr
    assert aliases("rolling") == {"champion": "1", "previous": "2"}
    assert promotion(shared_store).data.tags["champion_version"] == "1"


def test_other_pictures_than_the_champions_are_refused(ptq_run: Run, shared_store: Path) -> None:
    other = copied(ptq_run, shared_store, "other pictures", tags={"evaluation_digest": "other"})
    first = ("--name", "pictures", "--run-id", ptq_run.info.run_id, *LENIENT)
    assert run_pipeline(shared_store, "promote", *first).returncode == 0
    second = ("--name", "pictures", "--run-id", other.info.run_id, *LENIENT)
    done = run_pipeline(shared_store, "promote", *second)
    assert done.returncode == 1
    assert "refused: same_evaluation: evaluation_digest is other, but" in done.stderr
    assert run_pipeline(shared_store, "promote", *second, "--same-evaluation", "false").returncode == 0
    assert aliases("pictures") == {"champion": "2", "previous": "1"}


def test_to_challenger(ptq_run: Run, shared_store: Path) -> None:
    options = ("--name", "waiting", "--run-id", ptq_run.info.run_id, *LENIENT)
    done = run_pipeline(shared_store, "promote", *options, "--to", "challenger")
    assert done.returncode == 0, done.stderr
    assert aliases("waiting") == {"challenger": "1"}
    assert run_pipeline(shared_store, "promote", *options).returncode == 0
    assert aliases("waiting") == {"champion": "1"}


@pytest.mark.parametrize("listed", [True, False])
def test_best_of_a_compare_run(listed: bool, ptq_run: Run, shared_store: Path) -> None:
    with_parent = {}
    use_store(shared_store)
    parent = copied(ptq_run, shared_store, "compare", tags={"entry_point": "compare"})
    if not listed:
        with_parent = {"mlflow.parentRunId": parent.info.run_id}
    small = copied(ptq_run, shared_store, "small", {"onnx_mb": 0.5, "mAP50-95": 0.2}, with_parent)
    exact = copied(ptq_run, shared_store, "exact", {"onnx_mb": 2.0, "mAP50-95": 0.8}, with_parent)
    floats = copied(ptq_run, shared_store, "floats", {"mAP50-95": 0.9}, with_parent | {"entry_point": "baseline"})
    if listed:
        run_ids = [run.info.run_id for run in (small, exact, floats)]
        mlflow.MlflowClient().set_tag(parent.info.run_id, "compared_run_ids", ",".join(run_ids))
    name = f"best {listed}"
    options = ("--name", name, "--from", parent.info.run_id, *LENIENT)

    done = run_pipeline(shared_store, "promote", *options, "--min-mAP", "0.95")
    assert done.returncode == 1
    assert "refused: none of 2 runs passes: " in done.stderr
    for text in (f"small ({small.info.run_id[:8]}): min_mAP", f"exact ({exact.info.run_id[:8]}): min_mAP"):
        assert text in done.stderr
    assert not is_registered(name)

    assert run_pipeline(shared_store, "promote", *options).returncode == 0
    assert mlflow.MlflowClient().get_model_version_by_alias(name, "champion").run_id == exact.info.run_id
    assert run_pipeline(shared_store, "promote", *options, "--best-by", "onnx_mb").returncode == 0
    assert mlflow.MlflowClient().get_model_version_by_alias(name, "champion").run_id == small.info.run_id

    mlflow.MlflowClient().set_tag(small.info.run_id, "head", "one2many")
    done = run_pipeline(shared_store, "promote", *options)
    assert done.returncode == 1
    assert "these runs are not comparable, head differs" in done.stderr


def test_a_failed_run_is_refused(ptq_run: Run, shared_store: Path) -> None:
    failed = copied(ptq_run, shared_store, "failed")
    mlflow.MlflowClient().set_terminated(failed.info.run_id, "FAILED")
    done = run_pipeline(shared_store, "promote", "--name", "broken", "--run-id", failed.info.run_id, *LENIENT)
    assert done.returncode == 1
    assert "error: refused: finished: the run's status is FAILED, must be FINISHED" in done.stderr
    assert not is_registered("broken")


CASES = {
    "no name": (("--run-id", "1"), 2, "name: missing"),
    "bad name": (("--name", "a/b", "--run-id", "1"), 2, "name=a/b: not a model's name; use letters"),
    "quote": (("--name", "a' or 'b", "--run-id", "1"), 2, "not a model's name"),
    "neither": (("--name", "n"), 2, "run_id: missing; give run_id, from=COMPARE_RUN, or rollback=true"),
    "both": (("--name", "n", "--run-id", "1", "--from", "2"), 2, "from=2: run_id=1 is given too; give one of the two"),
    "unknown run": (("--name", "n", "--run-id", "0123"), 1, "run_id=0123: no such run at sqlite:"),
    "strange run": (("--name", "n", "--run-id", "../x"), 1, "run_id=../x: no such run at sqlite:"),
    "unknown parent": (("--name", "n", "--from", "0123"), 1, "from=0123: no such run at sqlite:"),
    "rollback of a run": (("--name", "n", "--rollback", "true", "--from", "1"), 2, "from: rollback=true takes no run"),
    "rollback to": (("--name", "n", "--rollback", "true", "--to", "challenger"), 2, "to=challenger: rollback=true"),
    "nothing to return to": (("--name", "n", "--rollback", "true"), 1, "name=n: has no previous version to return to"),
    "alias": (("--name", "n", "--run-id", "1", "--to", "king"), 2, "to=king: unknown alias; use one of champion"),
    "metric": (("--name", "n", "--run-id", "1", "--best-by", "luck"), 2, "best_by=luck: unknown metric; use one of"),
    "negative": (("--name", "n", "--run-id", "1", "--max-drop", "-1"), 2, "max_drop=-1.0: must be a number from 0"),
    "nan": (("--name", "n", "--run-id", "1", "--min-mAP", "nan"), 2, "min_mAP=nan: must be a number from 0"),
    "percent": (("--name", "n", "--run-id", "1", "--min-mAP", "40"), 2, "min_mAP=40.0: must be a fraction from 0 to 1"),
    "percent of agreement": (
        ("--name", "n", "--run-id", "1", "--min-agreement", "90"),
        2,
        "min_agreement=90.0: must be a fraction from 0 to 1",
    ),
    "text": (("--name", "n", "--run-id", "1", "--min-mAP", "high"), 2, "min_mAP=high: not a number"),
    "better than what": (
        ("--name", "n", "--run-id", "1", "--require-better", "true", "--same-evaluation", "false"),
        2,
        "require_better=true: accuracies on different pictures do not compare",
    ),
    "field's own name": (("--name", "n", "--from-run", "1"), 2, "--from-run: unknown option"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case: str, shared_store: Path) -> None:
    options, code, message = CASES[case]
    done = run_pipeline(shared_store, "promote", *options)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    last = promotion(shared_store)
    assert last.info.status == "FAILED"
    assert message in last.data.tags["failure_reason"]
    assert not is_registered("n")


def test_parent_without_ptq_runs(ptq_run: Run, shared_store: Path) -> None:
    done = run_pipeline(shared_store, "promote", "--name", "n", "--from", ptq_run.data.tags["baseline_run_id"])
    assert done.returncode == 1
    assert "no finished ptq or qat run among its runs; give a compare run, or run_id" in done.stderr


def test_the_start_nested_in_a_training_is_not_taken_for_it(ptq_run: Run, shared_store: Path) -> None:
    training = copied(ptq_run, shared_store, "training", tags={"entry_point": "qat"})
    copied(ptq_run, shared_store, "start", tags={"mlflow.parentRunId": training.info.run_id})
    done = run_pipeline(shared_store, "promote", "--name", "n", "--from", training.info.run_id, *LENIENT)
    assert done.returncode == 1
    assert f"error: from={training.info.run_id}: is itself a ptq or qat run; give it as run_id" in done.stderr
    assert not is_registered("n")


def test_two_commands_at_once(ptq_run: Run, shared_store: Path) -> None:
    other = copied(ptq_run, shared_store, "the other")
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{shared_store}/mlflow.db"}
    command = [sys.executable, str(ROOT / "pipelines/promote.py"), "--name", "raced", *LENIENT]
    processes = [
        subprocess.Popen(
            [*command, "--run-id", run.info.run_id],
            cwd=shared_store,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for run in (ptq_run, other)
    ]
    for process in processes:
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr
    assert aliases("raced") == {"champion": "2", "previous": "1"}
    versions = mlflow.MlflowClient().search_model_versions("name = 'raced'")
    assert {version.run_id for version in versions} == {ptq_run.info.run_id, other.info.run_id}
