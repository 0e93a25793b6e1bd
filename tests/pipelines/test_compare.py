"""`compare` and `reproduce` as a user runs them, with a small detector and few pictures."""

import json
from pathlib import Path

import mlflow
import pytest
from command import QUICK, newest_run, run_pipeline
from mlflow.entities import Run

PLOTS = {"pareto_latency.png", "pareto_size.png", "class_drop.png", "activation_ranges.png"}


def logged(run: Run, folder: str | None = None) -> set[str]:
    return {Path(entry.path).name for entry in mlflow.MlflowClient().list_artifacts(run.info.run_id, folder)}


@pytest.fixture(scope="session")
def comparison(ptq_run: Run, shared_store: Path) -> Run:
    """Two modes that `ptq_run` has measured, and one that it has not."""
    done = run_pipeline(shared_store, "compare", *QUICK, "--modes", "fp32,fp16,w4a8")
    assert done.returncode == 0, done.stderr
    assert "w4a8: reusing run" in done.stderr
    assert "fp32: reusing run" in done.stderr
    assert "fp16: measuring" in done.stderr
    return newest_run(shared_store, "compare")


def test_the_comparison_is_logged_whole(comparison: Run, ptq_run: Run) -> None:
    assert comparison.info.run_name == "compare-3-small"
    assert logged(comparison) >= {"comparison.json", "report.html", "summary.md", "plots"}
    assert logged(comparison, "plots") == PLOTS
    table = json.loads(mlflow.artifacts.load_text(f"runs:/{comparison.info.run_id}/comparison.json"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {row["run"] for row in rows} == {"float32", "float16", "W4A8"}
    assert {row["group"] for row in rows} == {1}
    (quantized,) = [row for row in rows if row["run"] == "W4A8"]
    assert quantized["mAP50-95"] == pytest.approx(ptq_run.data.metrics["mAP50-95"], abs=1e-4)
    assert quantized["times float32"] > 0


def test_runs_are_held_against_each_other_over_the_same_pictures(comparison: Run, ptq_run: Run) -> None:
    table = json.loads(mlflow.artifacts.load_text(f"runs:/{comparison.info.run_id}/differences.json"))
    pairs = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(pairs) == 3
    (pair,) = [one for one in pairs if {one["better run"], one["other run"]} == {"float32", "W4A8"}]
    sign = 1 if pair["better run"] == "float32" else -1
    drop = ptq_run.data.metrics
    ends = sorted(sign * drop[f"mAP50-95_drop_ci_{end}"] for end in ("low", "high"))
    assert pair["points"] == pytest.approx(sign * drop["mAP50-95_drop"], abs=1e-3)
    assert [pair["from"], pair["to"]] == pytest.approx(ends, abs=1e-3)
    assert "is above by" in mlflow.artifacts.load_text(f"runs:/{comparison.info.run_id}/summary.md")


def test_the_new_child_is_nested_and_all_are_listed(comparison: Run, ptq_run: Run, shared_store: Path) -> None:
    listed = comparison.data.tags["compared_run_ids"].split(",")
    assert len(listed) == 3
    half = newest_run(shared_store, "baseline")
    assert half.data.tags["mode"] == "fp16"
    assert half.data.tags["mlflow.parentRunId"] == comparison.info.run_id


def test_runs_are_compared_by_id(comparison: Run, shared_store: Path) -> None:
    listed = comparison.data.tags["compared_run_ids"]
    done = run_pipeline(shared_store, "compare", "--runs", listed)
    assert done.returncode == 0, done.stderr
    again = newest_run(shared_store, "compare")
    assert again.info.run_id != comparison.info.run_id
    assert again.data.tags["compared_run_ids"].split(",") == listed.split(",")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--runs", "nosuchrun,nosuchrun2"), 1, "runs=nosuchrun: no such run"),
        (("--runs", "one"), 2, "give at least two run ids"),
        (("--runs", "one,two", "--modes", "w4a8"), 2, "modes=w4a8: runs=one,two is given too; give one of the two"),
        (("--runs", "one,two,one"), 2, "runs=one,two,one: one is named twice"),
        (("--modes", "w4a8,w3a8"), 2, "modes=w3a8: unknown mode"),
        (("--modes", ","), 2, "modes=,: names none"),
        (("--modes", "w4a8,W4A8"), 2, "w4a8 is named twice"),
        (("--modes", "w4a8", "--avg-bits", "9"), 2, "avg_bits=9.0"),
    ],
)
def test_what_cannot_be_compared_is_refused(store: Path, options: tuple[str, ...], code: int, message: str) -> None:
    done = run_pipeline(store, "compare", *QUICK, *options)
    assert done.returncode == code
    assert message in done.stderr
    run = newest_run(store, "compare")
    assert run.info.status == "FAILED"
    assert message in run.data.tags["failure_reason"]


def test_a_mode_that_fails_does_not_stop_the_others(shared_store: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "greedy.yaml"
    calibrated = "insert_quantizers, observe_activations, mse_weight_scales, min_max_activation_ranges"
    recipe.write_text(f"steps: [{calibrated}, {{distillation: {{steps: 1}}}}]\n")
    options = (*QUICK, "--calib-images", "1", "--recipe", str(recipe))  # distillation needs a picture to hold back
    done = run_pipeline(shared_store, "compare", *options, "--modes", "w4a16,fp32")
    assert done.returncode == 1
    assert "1 of the modes failed, the others are compared: w4a16:" in done.stderr
    run = newest_run(shared_store, "compare")
    assert run.info.status == "FAILED"
    assert "at least 2 calibration pictures" in run.data.tags["failure_reason"]
    assert logged(run) >= {"comparison.json", "report.html"}
    assert len(run.data.tags["compared_run_ids"].split(",")) == 1
    done = run_pipeline(shared_store, "compare", *options, "--modes", "w4a16")
    assert done.returncode == 1
    assert "there is nothing to compare: w4a16:" in done.stderr


def test_a_run_that_compares_nothing_is_refused(comparison: Run, shared_store: Path) -> None:
    done = run_pipeline(shared_store, "compare", "--runs", f"{comparison.info.run_id},{comparison.info.run_id[:-1]}")
    assert done.returncode == 1
    assert "does not say its head" in done.stderr


def test_a_run_is_reproduced_from_its_record(shared_store: Path) -> None:
    options = ("--mode", "w8a8", "--recipe", "fast", "--placement", "full", "--seed", "3")  # full changes the recipe
    done = run_pipeline(shared_store, "ptq", *QUICK, *options)
    assert done.returncode == 0, done.stderr
    first = newest_run(shared_store, "ptq")
    done = run_pipeline(shared_store, "reproduce", "--run-id", first.info.run_id)
    assert done.returncode == 0, done.stderr
    assert "is reproduced" in done.stderr
    record = json.loads(
        mlflow.artifacts.load_text(f"runs:/{newest_run(shared_store, 'reproduce').info.run_id}/reproduction.json")
    )
    assert record["equal"]
    assert record["compared"] > 20

    mlflow.MlflowClient().log_metric(first.info.run_id, "mAP50", 0.123)
    done = run_pipeline(shared_store, "reproduce", "--run-id", first.info.run_id)
    assert done.returncode == 1
    assert "was not reproduced: mAP50 was 0.123, is 0." in done.stderr
    assert newest_run(shared_store, "reproduce").data.metrics["differences"] == 1


def test_only_finished_runs_are_reproduced(comparison: Run, shared_store: Path) -> None:
    done = run_pipeline(shared_store, "reproduce", "--run-id", comparison.info.run_id)
    assert done.returncode == 1
    assert "give a finished run of baseline, ptq, qat, evaluate" in done.stderr
