"""What a run is done again with."""

from pathlib import Path

import mlflow
import pytest

from quantrack.settings import OnnxSettings
from quantrack.tracking.models import VERSION_TAG
from quantrack.tracking.reproduce import read_record
from quantrack.tracking.run import tracked_run


@pytest.mark.parametrize("path", ["", "/data/small-w4a8-qcdq-ptq-opt.onnx"])
def test_an_alias_stands_for_what_it_stood_for_then(path: str, store: Path, tmp_path: Path) -> None:
    with tracked_run("evaluate", {"onnx": f"models:/watch@champion{path}", "data_root": "demo"}) as run:
        mlflow.set_tag(VERSION_TAG, "models:/watch/3")
    settings = read_record(run.info.run_id, "", tmp_path).settings
    assert isinstance(settings, OnnxSettings)
    assert settings.onnx == f"models:/watch/3{path}"


def test_a_version_or_a_file_stays_what_it_is(store: Path, tmp_path: Path) -> None:
    for reference in ("models:/watch/3", "runs:/0123/onnx", "a/file.onnx"):
        with tracked_run("evaluate", {"onnx": reference, "data_root": "demo"}) as run:
            pass
        settings = read_record(run.info.run_id, "", tmp_path).settings
        assert isinstance(settings, OnnxSettings)
        assert settings.onnx == reference
