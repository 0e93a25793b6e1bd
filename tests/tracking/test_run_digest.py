"""A finished run is found by its digest as long as its files are there."""

from pathlib import Path

import mlflow
import pytest

from quantrack.tracking.run import tracked_run
from quantrack.tracking.run_digest import RUN_DIGEST, find_finished


def finished(digest: str, *artifacts: str) -> str:
    with tracked_run("ptq", {}) as run:
        mlflow.set_tag(RUN_DIGEST, digest)
        for name in artifacts:
            mlflow.log_text("any", name)
    return str(run.info.run_id)


def test_a_run_whose_files_are_gone_hides_no_older_one(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, emptied = finished("one", "onnx/w4a8.onnx"), finished("one", "detections.json")
    finished("another", "onnx/w4a8.onnx")
    with tracked_run("compare", {}):
        found = find_finished("one")
        assert find_finished("a third") is None
    assert found is not None
    assert found.info.run_id == whole
    assert f"what run {emptied} has logged is gone" in capsys.readouterr().err
