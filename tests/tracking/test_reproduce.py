"""What a run is done again with."""

from pathlib import Path
from typing import Any

import mlflow
import pytest

from quantrack.quantization.recipe import RECIPES, Recipe
from quantrack.settings import OnnxSettings, PtqSettings, setting_texts
from quantrack.tracking.log import log_recipe
from quantrack.tracking.models import log_given_file, of_a_version
from quantrack.tracking.read import BASELINE_TAG, read_json
from quantrack.tracking.reproduce import log_reproduction, read_record
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
        log_given_file(reference, of_a_version(reference), file)
        mlflow.log_dict({}, "environment.json")
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("watch", "champion", client.create_model_version("watch", str(folder)).version)
    settings = read_record(run.info.run_id, "", folder).settings
    assert isinstance(settings, OnnxSettings)
    return settings.onnx


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("path", ["", f"/{FILE}"])
@pytest.mark.parametrize(
    ("given", "version"), [("watch@champion", 2), ("watch/latest", 3), ("watch/Latest", 3), ("watch/1", 1)]
)
def test_what_may_move_stands_for_what_it_was(given: str, version: int, path: str, tmp_path: Path) -> None:
    assert reproduced(f"models:/{given}{path}", tmp_path) == f"models:/watch/{version}{path}"


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("reference", ["runs:/0123/onnx", "a/file.onnx", "models:/m-0123"])
def test_what_cannot_move_stays_as_it_is(reference: str, tmp_path: Path) -> None:
    assert reproduced(reference, tmp_path) == reference


def quantized(settings: PtqSettings, recipe: Recipe) -> str:
    """The id of a finished `ptq` run that logged a recipe."""
    with tracked_run("ptq", setting_texts(settings)) as run:
        log_recipe(recipe)
        mlflow.set_tag("recipe", recipe.name)
        mlflow.log_dict({}, "environment.json")
        mlflow.log_metrics({"mAP50-95": 0.4, "onnx_mb": 2.5})
    return str(run.info.run_id)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "given",
    [
        {"mode": "w4a8"},
        {"mode": "w8a8"},
        {"mode": "w8a16", "recipe": "best"},
        {"mode": "w4a8", "placement": "full"},
        {"mode": "w4a16", "weight_storage": "int4"},
        {"mode": "w4a8", "recipe": "fast", "avg_bits": 4.2, "plan_bits": "4,7", "plan_by": "layer"},
        {"mode": "w8a8", "recipe": "fast", "target": "tensorrt"},
    ],
    ids=str,
)
def test_a_recipe_of_ours_keeps_its_name(given: dict[str, Any], tmp_path: Path) -> None:
    """Its name is in the file, so a file of another name has other bytes."""
    settings = PtqSettings(**given)
    again = read_record(quantized(settings, settings.chosen_recipe), "", tmp_path).settings
    assert isinstance(again, PtqSettings)
    assert again == settings
    assert again.chosen_recipe == settings.chosen_recipe


@pytest.mark.usefixtures("store")
def test_a_recipe_that_has_other_steps_by_now_is_taken_from_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = PtqSettings(mode="w8a8", recipe="fast")
    of_then = Recipe("fast", RECIPES["fast"][:-1])
    record = read_record(quantized(settings, of_then), "", tmp_path)
    assert isinstance(record.settings, PtqSettings)
    assert record.settings.chosen_recipe.steps == of_then.steps
    again = quantized(record.settings, record.settings.chosen_recipe)
    mlflow.MlflowClient().log_metric(again, "onnx_mb", 2.6)
    with tracked_run("reproduce", {}):
        assert log_reproduction(record, again) == ()
    said = capsys.readouterr().err
    assert (
        "recipe=fast has other steps by now, so the recorded ones ran under another name; not compared: onnx_mb" in said
    )


def evaluated(baseline: str, drop: float, mean_precision: float = 0.4, *, with_agreement: bool = True) -> str:
    """The id of an `evaluate` run that was held against a baseline."""
    with tracked_run("evaluate", {"onnx": "a/file.onnx", "data_root": "demo"}) as run:
        mlflow.set_tags({BASELINE_TAG: baseline} if baseline else {})
        mlflow.log_dict({}, "environment.json")
        mlflow.log_metrics({"mAP50-95": mean_precision, "mAP50-95_drop": drop, "mAP50-95_drop_ci_low": drop - 1})
        mlflow.log_metrics({"float32_agreement": 1 - drop / 10} if with_agreement else {})
    return str(run.info.run_id)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("again", "differing"),
    [(("one", 1.0), 0), (("one", 2.0), 3), (("another", 2.0), 0), (("another", 2.0, 0.3), 1), (("", 2.0), 0)],
)
def test_drops_from_two_baselines_are_not_compared(again: tuple, differing: int, tmp_path: Path) -> None:
    record = read_record(evaluated("one", 1.0), "", tmp_path)
    again_id = evaluated(*again)
    with tracked_run("reproduce", {}) as run:
        found = log_reproduction(record, again_id)
    assert len(found) == differing
    said = read_json(run.info.run_id, "reproduction.json")
    assert said["equal"] == (differing == 0)
    held_against = ["float32_agreement", "mAP50-95_drop", "mAP50-95_drop_ci_low"]
    assert said["not_compared"] == ([] if again[0] == "one" else held_against)


@pytest.mark.usefixtures("store")
def test_a_record_of_before_agreement_was_logged_comes_out_again(tmp_path: Path) -> None:
    record = read_record(evaluated("one", 1.0, with_agreement=False), "", tmp_path)
    again_id = evaluated("one", 1.0)
    with tracked_run("reproduce", {}):
        assert log_reproduction(record, again_id) == ()
