"""A float32 baseline whose artifacts are gone is none."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from quantrack.comparison.runs import ComparisonKey
from quantrack.tracking.baseline import find_baseline
from quantrack.tracking.models import float_file_of
from quantrack.tracking.run import tracked_run

KEY = ComparisonKey("model", "evaluation", "one2one", 64, "cpu")


@pytest.mark.parametrize("logged", [("detections.json", "onnx/float32.onnx"), ("detections.json",), ()])
def test_only_one_that_is_whole_is_used(
    logged: tuple[str, ...], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracked_run("baseline", {}) as baseline:
        mlflow.set_tags({"mode": "fp32", **KEY.tags()})
        for name in logged:
            mlflow.log_text("[]", name)
    with tracked_run("ptq", {}) as run:
        mlflow.set_tag("baseline_run_id", baseline.info.run_id)
        found = find_baseline(KEY)
    whole = len(logged) == 2
    assert (found is not None) == whole
    assert ("has logged is gone" in capsys.readouterr().err) != whole
    onnx = f"runs:/{run.info.run_id}/onnx/w4a8.onnx"
    assert float_file_of(onnx) == (f"runs:/{baseline.info.run_id}/onnx" if whole else "")
    with tracked_run("baseline", {}) as emptied:  # a newer one without them hides nothing
        mlflow.set_tags({"mode": "fp32", **KEY.tags()})
    with tracked_run("ptq", {}):
        found = find_baseline(KEY)
    assert (found.run_id if found else None) == (baseline.info.run_id if whole else None)
    assert emptied.info.run_id != baseline.info.run_id
    MlflowClient().delete_run(baseline.info.run_id)
    assert float_file_of(onnx) == ""
