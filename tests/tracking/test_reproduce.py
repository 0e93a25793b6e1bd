"""What a run is done again with."""

from pathlib import Path

import mlflow
import pytest

from quantrack.settings import OnnxSettings
from quantrack.tracking.models import log_given_file
from quantrack.tracking.reproduce import read_record
from quantrack.tracking.run import tracked_run

FILE = "data/small-w4a8-qcdq-ptq-opt.onnx"


@pytest.fixture
def versions(store: Path) -> None:
    """A model of three versions, of which the second is the champion."""
    client = mlflow.MlflowClient()
    client.create_registered_model("watch")
    for _ in range(3):
        client.create_model_version("watch", str(store))
    client.set_registered_model_alias("watch", "champion", "2")


def reproduced(reference: str, folder: Path) -> str:
    """What `onnx` is when an `evaluate` run of this reference is done again, another version being the newest."""
    file = folder / "file.onnx"
    file.write_bytes(b"any")
    with tracked_run("evaluate", {"onnx": reference, "data_root": "demo"}) as run:
        log_given_file(reference, file)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("watch", "champion", client.create_model_version("watch", str(folder)).version)
    settings = read_record(run.info.run_id, "", folder).settings
    assert isinstance(settings, OnnxSettings)
    return settings.onnx


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("path", ["", f"/{FILE}"])
@pytest.mark.parametrize(("given", "version"), [("watch@champion", 2), ("watch/latest", 3), ("watch/1", 1)])
def test_what_may_move_stands_for_what_it_was(given: str, version: int, path: str, tmp_path: Path) -> None:
    assert reproduced(f"models:/{given}{path}", tmp_path) == f"models:/watch/{version}{path}"


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("reference", ["runs:/0123/onnx", "a/file.onnx", "models:/m-0123"])
def test_what_cannot_move_stays_as_it_is(reference: str, tmp_path: Path) -> None:
    assert reproduced(reference, tmp_path) == reference
