"""The entry points as a user runs them, with a small detector and few pictures, and once with the embedded demo."""

import json
from pathlib import Path

import mlflow
import pytest
import yaml
from command import QUICK, SMALL_LAYERS, run_pipeline, use_store
from mlflow.entities import Run

METRICS = {
    "mAP50-95", "mAP50", "mAP75", "mAP50-95_small", "mAP50-95_medium", "mAP50-95_large", "AR100", "mAP50-95_drop",
    "mAP50-95_drop_ci_low", "mAP50-95_drop_ci_high", "float32_agreement",
    "latency_ms_mean", "latency_ms_p50", "latency_ms_p90", "latency_ms_p99", "nodes_QuantizeLinear",
    "nodes_DequantizeLinear", "nodes_Clip", "nodes_Conv", "nodes_total", "weight_bits_avg", "onnx_mb",
    "parity_mean_abs", "parity_max_abs", "quantize_seconds", "eval_seconds", "latency_ratio", "latency_ratio_ci_low",
    "latency_ratio_ci_high", "latency_ms_p50_ci_low", "nodes_int8_compute", "nodes_memcpy", "peak_rss_mb",
}  # fmt: skip
ARTIFACTS = {
    "config.yaml", "calibration.json", "layers.json", "coco_metrics.json", "per_class_ap.json", "detections.json",
    "environment.json", "placement.json", "plots/placement.png", "summary.md",
    "plots/precision_recall.png", "plots/per_class_ap.png",
    "onnx/small-w4a8-qcdq-ptq.onnx", "onnx/small-w4a8-qcdq-ptq-opt.onnx",
}  # fmt: skip


def runs(folder: Path) -> list[Run]:
    use_store(folder)
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return [run for run in found if isinstance(run, Run)]


def named(folder: Path, name: str) -> Run:
    return next(run for run in runs(folder) if run.info.run_name == name)


def artifacts(run: Run, path: str = "") -> set[str]:
    found: set[str] = set()
    for entry in mlflow.MlflowClient().list_artifacts(run.info.run_id, path or None):
        found |= artifacts(run, entry.path) if entry.is_dir else {entry.path}
    return found


def test_ptq_logs_the_whole_contract(ptq_run: Run) -> None:
    assert ptq_run.info.status == "FINISHED"
    assert set(ptq_run.data.metrics) >= METRICS
    assert artifacts(ptq_run) >= ARTIFACTS
    assert sum(name.startswith("samples/") for name in artifacts(ptq_run)) == 8
    tags = ptq_run.data.tags
    assert (tags["provider"], tags["head"], tags["mode"]) == ("cpu", "one2one", "w4a8")
    assert {"device_name", "model_digest", "evaluation_digest", "calibration_digest"} <= set(tags)
    assert ptq_run.data.params["mode"] == "W4A8"  # as typed
    assert ptq_run.data.params["latency_runs"] == "5"
    assert {item.tags[0].value for item in ptq_run.inputs.dataset_inputs} == {"calibration", "evaluation"}


def test_ptq_artifacts_say_what_was_done(ptq_run: Run) -> None:
    def read(name: str) -> str:
        return str(mlflow.artifacts.load_text(f"runs:/{ptq_run.info.run_id}/{name}"))

    calibration = json.loads(read("calibration.json"))
    assert (calibration["images"], calibration["seed"]) == (6, 0)
    assert calibration["pictures"] == [f"{index:012d}.jpg" for index in range(1, 7)]
    assert len(calibration["activation_quantizers"]) == SMALL_LAYERS
    assert set(next(iter(calibration["activation_quantizers"].values()))) >= {"scale", "zero_point", "minimum"}
    layers = json.loads(read("layers.json"))
    assert [row["weight_bits"] for row in layers if row["role"] == "dfl"] == ["float"]
    assert {row["weight_bits"] for row in layers if row["role"] == "depthwise"} == {7}  # the most of a plan
    assert yaml.safe_load(read("config.yaml"))["resolved"]["device"] in ("cpu", "cuda")
    assert "mAP50-95" in read("summary.md")


def test_baseline_is_nested_once_and_reused(ptq_run: Run, shared_store: Path) -> None:
    baseline = named(shared_store, "baseline-fp32-small")
    assert baseline.data.tags["mlflow.parentRunId"] == ptq_run.info.run_id
    assert "peak_rss_mb" not in baseline.data.metrics  # the process had quantized before
    expected = 100 * (baseline.data.metrics["mAP50-95"] - ptq_run.data.metrics["mAP50-95"])
    assert ptq_run.data.metrics["mAP50-95_drop"] == pytest.approx(expected)
    done = run_pipeline(shared_store, "ptq", *QUICK, "--mode", "w8a16", "--recipe", "naive")
    assert done.returncode == 0, done.stderr
    assert "reusing run" in done.stderr
    digest = ptq_run.data.tags["evaluation_digest"]  # other files of tests measure other pictures
    float32 = {"entry_point": "baseline", "mode": "fp32", "evaluation_digest": digest}
    assert sum(float32.items() <= run.data.tags.items() for run in runs(shared_store)) == 1


def test_model_is_logged_with_its_metrics(ptq_run: Run, shared_store: Path) -> None:
    experiment = ptq_run.info.experiment_id
    models = mlflow.search_logged_models(experiment_ids=[experiment], output_format="list")
    mine = [model for model in models if model.source_run_id == ptq_run.info.run_id]
    assert len(mine) == 1
    assert {metric.key for metric in mine[0].metrics} >= {"mAP50-95", "latency_ms_p50"}


def test_same_command_twice_gives_the_same_metrics(
    ptq_run: Run, shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTRACK_CACHE", str(tmp_path))  # no step of the first run may be reused
    done = run_pipeline(shared_store, "ptq", *QUICK, "--mode", "w4a8")
    assert done.returncode == 0, done.stderr
    again = named(shared_store, "ptq-w4a8-default-small")
    assert again.info.run_id != ptq_run.info.run_id
    for name, value in ptq_run.data.metrics.items():
        of_the_moment = ("latency", "steps_from_cache", "busy_cores", "peak_rss")
        if not name.startswith(of_the_moment) and not name.endswith("seconds"):
            assert again.data.metrics[name] == value, name


def test_evaluate_a_logged_file_gives_the_same_accuracy(ptq_run: Run, shared_store: Path) -> None:
    uri = f"runs:/{ptq_run.info.run_id}/onnx/small-w4a8-qcdq-ptq-opt.onnx"
    done = run_pipeline(shared_store, "evaluate", *QUICK, "--onnx", uri)
    assert done.returncode == 0, done.stderr
    scored = named(shared_store, "evaluate-w4a8-small")
    for name in (
        "mAP50-95",
        "AR100",
        "mAP50-95_drop",
        "mAP50-95_drop_ci_low",
        "mAP50-95_drop_ci_high",
        "float32_agreement",
        "weight_bits_avg",
    ):
        assert scored.data.metrics[name] == pytest.approx(ptq_run.data.metrics[name]), name
    assert "parity_mean_abs" not in scored.data.metrics
    assert scored.data.tags["baseline_run_id"] == ptq_run.data.tags["baseline_run_id"]
    assert f"mAP50-95 {scored.data.metrics['mAP50-95']:.4f}, " in done.stderr


def test_evaluate_refuses_another_input_size(ptq_run: Run, shared_store: Path) -> None:
    uri = f"runs:/{ptq_run.info.run_id}/onnx/small-w4a8-qcdq-ptq-opt.onnx"
    done = run_pipeline(shared_store, "evaluate", *QUICK, "--onnx", uri, "--imgsz", "256")
    assert done.returncode == 2
    assert f"imgsz=256: {uri} takes 320; leave imgsz out" in done.stderr


def test_evaluate_refuses_the_other_head(ptq_run: Run, shared_store: Path) -> None:
    uri = f"runs:/{ptq_run.info.run_id}/onnx/small-w4a8-qcdq-ptq-opt.onnx"
    done = run_pipeline(shared_store, "evaluate", *QUICK, "--onnx", uri, "--head", "one2many")
    assert done.returncode == 2
    assert "use head=one2one" in done.stderr


def test_benchmark_measures_speed_only(ptq_run: Run, shared_store: Path) -> None:
    uri = f"runs:/{ptq_run.info.run_id}/onnx/small-w4a8-qcdq-ptq-opt.onnx"
    done = run_pipeline(shared_store, "benchmark", "--onnx", uri, "--latency-runs", "5")
    assert done.returncode == 0, done.stderr
    timed = named(shared_store, "benchmark-w4a8-small")
    assert timed.data.metrics["latency_ms_p50"] > 0
    assert (timed.data.params["model_resolved"], timed.data.params["imgsz_resolved"]) == ("small", "320")
    session = json.loads(mlflow.artifacts.load_text(f"runs:/{timed.info.run_id}/session.json"))
    assert (session["optimization"], session["fold_weights"]) == ("all", True)
    assert session["threads"] >= 1
    assert "mAP50-95" not in timed.data.metrics
    # in turns with the float32 file of the run behind the address
    assert timed.data.metrics["latency_ratio"] > 0


def test_benchmark_finds_the_best_session_settings(ptq_run: Run, shared_store: Path) -> None:
    uri = f"runs:/{ptq_run.info.run_id}/onnx"
    done = run_pipeline(shared_store, "benchmark", "--onnx", uri, "--latency-runs", "10", "--tune", "true")
    assert done.returncode == 0, done.stderr
    timed = named(shared_store, "benchmark-w4a8-small")
    table = json.loads(mlflow.artifacts.load_text(f"runs:/{timed.info.run_id}/tuning.json"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {"defaults", "fold_weights=true", "optimization=extended"} <= {row["session"] for row in rows}
    assert [row["median ms"] for row in rows] == sorted(row["median ms"] for row in rows)
    assert all(row["times float32"] > 0 for row in rows)
    assert timed.data.tags["best_session_settings"] == rows[0]["session"] == timed.data.tags["session_settings"]


def test_integer_kernels_and_packed_weights(ptq_run: Run, shared_store: Path) -> None:
    done = run_pipeline(
        shared_store, "ptq", *QUICK, "--mode", "w4a8", "--placement", "full", "--weight-storage", "int4"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    small = named(shared_store, "ptq-w4a8-full-int4-default-small")
    assert small.data.tags["placement"] == "full"
    assert small.data.tags["weight_storage"] == "int4"
    metrics = small.data.metrics
    assert metrics["nodes_int8_compute"] == SMALL_LAYERS + 8 + 3  # Conv, Concat, Add; no SiLU is large here
    assert ptq_run.data.metrics["nodes_int8_compute"] == 0
    assert metrics["mAP50-95"] > ptq_run.data.metrics["mAP50-95"] - 0.05
    assert metrics["parity_mean_abs"] < 0.02
    assert metrics["onnx_mb"] < 0.7 * ptq_run.data.metrics["onnx_mb"]
    assert "onnx/small-w4a8-qcdq-ptq-full-int4-opt.onnx" in artifacts(small)


def test_fp16_baseline_is_held_against_fp32(ptq_run: Run, shared_store: Path) -> None:
    done = run_pipeline(shared_store, "baseline", *QUICK, "--precision", "fp16")
    assert "precision=fp16: ONNX Runtime's CPU provider computes it in float32" in done.stderr
    assert done.returncode == 0, done.stderr
    half = named(shared_store, "baseline-fp16-small")
    assert abs(half.data.metrics["mAP50-95_drop"]) < 2
    whole = named(shared_store, "baseline-fp32-small")
    assert half.data.metrics["onnx_mb"] < 0.55 * whole.data.metrics["onnx_mb"]


def test_one_to_many_head(ptq_run: Run, shared_store: Path) -> None:
    # the detector and the size that users get, unlike the other runs
    options = ("--model", "demo", "--imgsz", "640", "--mode", "w4a8", "--recipe", "fast", "--head", "one2many")
    done = run_pipeline(shared_store, "ptq", *QUICK, *options)
    assert done.returncode == 0, done.stderr
    many = named(shared_store, "ptq-w4a8-fast-yolov10n-demo")
    assert many.data.tags["head"] == "one2many"
    assert many.data.metrics["mAP50-95"] > 0.3
