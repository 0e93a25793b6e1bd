"""`sensitivity`, and `ptq` with its plan or with a recipe file, with a small detector and few pictures."""

import json
from pathlib import Path

import mlflow
import pytest
from command import SMALL, SMALL_LAYERS, newest_run, run_pipeline
from mlflow.entities import Run

# Small pictures: what is tested here is what the entry points do, not how well.
QUICK = (
    "--model", SMALL, "--data-root", "demo", "--eval-images", "8", "--calib-images", "6", "--imgsz", "160",
    "--latency-runs", "5",
)  # fmt: skip


@pytest.fixture(scope="module")
def sensitivity_run(shared_store: Path) -> Run:
    done = run_pipeline(shared_store, "sensitivity", *QUICK, "--avg-bits", "4.4")
    assert done.returncode == 0, done.stderr
    return newest_run(shared_store, "sensitivity")


def test_sensitivity_logs_table_plan_and_plot(sensitivity_run: Run) -> None:
    assert sensitivity_run.info.run_name == "sensitivity-w4a8-small"
    assert 4.3 < sensitivity_run.data.metrics["weight_bits_avg"] <= 4.4
    table = json.loads(mlflow.artifacts.load_text(f"runs:/{sensitivity_run.info.run_id}/sensitivity.json"))
    assert table["columns"] == [
        *("layer", "role", "weights"),
        *(f"error at {bits} bits" for bits in (3, 4, 5, 6, 7)),
        "planned bits",
    ]
    assert len(table["data"]) == SMALL_LAYERS
    logged = {entry.path for entry in mlflow.MlflowClient().list_artifacts(sensitivity_run.info.run_id, "plots")}
    assert logged == {"plots/sensitivity.png"}


def test_sensitivity_by_score_counts_lost_points(shared_store: Path) -> None:
    few = (*QUICK, "--eval-images", "3", "--calib-images", "3", "--plan-bits", "4,8")
    done = run_pipeline(shared_store, "sensitivity", *few, "--avg-bits", "5", "--measure", "mAP")
    assert "measure=mAP: the plan is chosen by the evaluation pictures" in done.stderr
    assert done.returncode == 0, done.stderr
    metrics = newest_run(shared_store, "sensitivity").data.metrics
    assert 4 <= metrics["weight_bits_avg"] <= 5
    assert 0 <= metrics["planned_error"] <= metrics["error_at_fewest_bits"]


def test_ptq_follows_the_plan(sensitivity_run: Run, shared_store: Path) -> None:
    plan = f"runs:/{sensitivity_run.info.run_id}/plan.json"
    done = run_pipeline(shared_store, "ptq", *QUICK, "--recipe", "fast", "--plan", plan)
    assert done.returncode == 0, done.stderr
    run = newest_run(shared_store, "ptq")
    assert run.data.metrics["weight_bits_avg"] == pytest.approx(sensitivity_run.data.metrics["weight_bits_avg"])
    assert run.data.metrics["weight_bits_stored_avg"] == 8  # INT8, whatever their bits
    used = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/plan.json"))
    assert used == json.loads(mlflow.artifacts.load_text(plan))


def test_ptq_plans_bits_of_channels_by_itself_under_a_budget(shared_store: Path) -> None:
    options = ("--recipe", "fast", "--avg-bits", "4.5", "--plan-bits", "4,8", "--plan-by", "channel")
    done = run_pipeline(shared_store, "ptq", *QUICK, *options, "--weight-storage", "int4")
    assert done.returncode == 0, done.stderr
    run = newest_run(shared_store, "ptq")
    assert 4.49 < run.data.metrics["weight_bits_avg"] <= 4.5
    assert run.data.metrics["weight_bits_stored_avg"] == run.data.metrics["weight_bits_avg"]  # nothing between 4 and 8
    assert run.data.metrics["quantize_seconds"] > run.data.metrics["steps/01_PlanBits/seconds"] > 0
    plan = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/plan.json"))
    assert len(plan["bits"]["model.0.conv"]) == 8
    layers = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/layers.json"))
    counts = [layer["weight_bits_of_channels"] for layer in layers if "weight_bits_of_channels" in layer]
    assert len(counts) == SMALL_LAYERS - 4  # the head's outputs, whose channels are classes and sides of boxes
    assert type(plan["bits"]["model.9.one2one_cv3.0.2"]) is int
    assert sum(set(count) == {"4", "8"} for count in counts) > SMALL_LAYERS / 4


def test_a_recipe_of_the_users_own(shared_store: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "learned.yaml"
    recipe.write_text(
        "steps:\n  - insert_quantizers\n  - observe_activations\n  - mse_weight_scales\n"
        "  - percentile_activation_ranges: {percentile: 99.99}\n"
        "  - block_reconstruction: {iterations: 4}\n  - distillation: {steps: 4, batch: 2}\n  - bias_correction\n"
    )
    done = run_pipeline(shared_store, "ptq", *QUICK, "--recipe", str(recipe))
    assert done.returncode == 0, done.stderr
    run = newest_run(shared_store, "ptq")
    assert run.info.run_name == "ptq-w4a8-learned-small"
    assert run.data.tags["recipe"] == "learned"
    metrics = run.data.metrics
    assert metrics["steps/06_Distillation/seconds"] > 0
    assert "steps/05_BlockReconstruction/divergence_after" in metrics
    assert "block_reconstruction:\n    iterations: 4" in mlflow.artifacts.load_text(
        f"runs:/{run.info.run_id}/recipe.yaml"
    )
