"""Every mode on real COCO pictures and real YOLOv10n weights, as a user runs it."""

from pathlib import Path

import mlflow
import pytest
from command import ROOT, newest_run, run_pipeline
from mlflow import MlflowClient
from mlflow.entities import Run

from quantrack.datasets.pictures import network_input
from quantrack.onnx.int4 import store_as_int4
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.recipe import CALIBRATED, Recipe
from quantrack.runtime.parity import require_same_outputs
from quantrack.runtime.session import open_session

pytestmark = pytest.mark.real
# benchmarks/accuracy_table.py takes the whole list, and three times as long. One number for all, who then share what
# is cached
CALIBRATION = "24"
INTEGER_KERNELS = ("--placement", "full", "--latency-runs", "50")  # five turns, whose median a slow one does not move
SLOWEST = 0.8  # times float32, with integer kernels: 0.55 where they were made, but the other worker disturbs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for this file, so that the float32 baseline is measured once."""
    return tmp_path_factory.mktemp("real")


def times_float32(run: Run, metric: str) -> float:
    """A metric as a multiple of the float32 baseline's."""
    baseline = MlflowClient().get_run(run.data.tags["baseline_run_id"])
    return float(run.data.metrics[metric] / baseline.data.metrics[metric])


def measure(real_inputs: Path, store: Path, entry_point: str, *options: str) -> Run:
    done = run_pipeline(
        store, entry_point,
        "--model", str(real_inputs / "weights/yolov10n.pt"),
        "--data-root", str(real_inputs / "coco2017"),
        "--calib-list", str(ROOT / "datasets/quantize-calib/quant100.txt"),
        "--calib-images", CALIBRATION, "--latency-runs", "5", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = newest_run(store, entry_point)
    assert found.info.status == "FINISHED"
    return found


def test_float_baseline(real_inputs: Path, store: Path) -> None:
    run = measure(real_inputs, store, "baseline")
    assert run.data.metrics["mAP50-95"] == pytest.approx(0.467, abs=0.003)
    assert run.data.metrics["parity_mean_abs"] < 1e-5


@pytest.mark.parametrize(
    ("mode", "bits", "least", "agreement"),
    [("w8a16", 8, 0.462, 0.98), ("w8a8", 8, 0.460, 0.96), ("w4a16", 4.5, 0.43, 0.92), ("w4a8", 4.5, 0.42, 0.91)],
)
def test_default_recipe(
    real_inputs: Path, store: Path, tmp_path: Path, mode: str, bits: float, least: float, agreement: float
) -> None:
    run = measure(real_inputs, store, "ptq", "--mode", mode)
    assert bits - 0.01 < run.data.metrics["weight_bits_avg"] <= bits
    assert run.data.metrics["mAP50-95"] >= least
    assert run.data.metrics["float32_agreement"] >= agreement
    assert run.data.metrics["parity_mean_abs"] < 0.02
    if bits < 8:
        assert_channels_are_packed(run, real_inputs, tmp_path / "packed.onnx")


def assert_channels_are_packed(run: Run, real_inputs: Path, packed: Path) -> None:
    """Those of 3 and 4 bits as INT4, the others as INT8: a smaller file that gives the same."""
    name = f"onnx/yolov10n-{run.data.tags['mode']}-qcdq-ptq-opt.onnx"
    source = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=name))
    assert store_as_int4(source, packed) > 0
    picture = network_input(min((real_inputs / "coco2017/val2017").glob("*.jpg")), 640)[None]
    require_same_outputs(open_session(source, "cpu"), open_session(packed, "cpu"), [picture])
    float32_mb = run.data.metrics["onnx_mb"] / times_float32(run, "onnx_mb")
    assert packed.stat().st_size / 1e6 < 0.26 * float32_mb


def test_bits_by_role_are_packed_by_a_recipe_file(real_inputs: Path, store: Path) -> None:
    recipe = store / "gptq.yaml"
    recipe.write_text(Recipe("gptq", (*CALIBRATED, Gptq(), BiasCorrection())).text())
    options = ("--recipe", str(recipe), "--avg-bits", "0", "--weight-storage", "int4")
    run = measure(real_inputs, store, "ptq", "--mode", "w4a16", *options)
    assert run.data.metrics["mAP50-95"] >= 0.40
    assert run.data.metrics["float32_agreement"] >= 0.86
    assert run.data.metrics["parity_mean_abs"] < 0.02
    assert times_float32(run, "onnx_mb") < 0.18


def test_a_bit_plan_keeps_to_its_budget_and_the_detector_with_integer_kernels(real_inputs: Path, store: Path) -> None:
    options = ("--avg-bits", "4.5", "--plan-bits", "4,7", "--weight-storage", "int4")
    run = measure(real_inputs, store, "ptq", "--mode", "w4a8", *INTEGER_KERNELS, *options)
    metrics = run.data.metrics
    assert 4.45 < metrics["weight_bits_avg"] <= 4.5
    assert metrics["mAP50-95"] >= 0.435
    assert metrics["float32_agreement"] >= 0.86
    assert metrics["mAP50-95_drop_ci_low"] < metrics["mAP50-95_drop"] < metrics["mAP50-95_drop_ci_high"]
    assert_integer_kernels(run)
    assert times_float32(run, "onnx_mb") < 0.25


def test_integer_kernels(real_inputs: Path, store: Path) -> None:
    run = measure(real_inputs, store, "ptq", "--mode", "w8a8", *INTEGER_KERNELS)
    # on these pictures mAP of eight like files was 0.452 to 0.465 by chance, and agreement 0.954 to 0.967
    assert run.data.metrics["mAP50-95"] >= 0.455
    assert run.data.metrics["float32_agreement"] >= 0.945
    assert_integer_kernels(run)


def assert_integer_kernels(run: Run) -> None:
    metrics = run.data.metrics
    assert metrics["nodes_int8_compute"] == 82 + 19 + 10 + 2 * 19  # Conv, Concat, Add, and the large SiLUs
    assert metrics["parity_mean_abs"] < 0.02
    assert metrics["latency_ratio"] < SLOWEST
    assert "exact_sums" not in run.data.tags["session_settings"]  # weights fit the usual kernels of any processor
