"""Where the pictures of recorded runs are no longer what they were, there is no interval, and it is said."""

import json

import mlflow
import pytest

from quantrack.comparison.runs import Circumstances, ComparedRun
from quantrack.datasets.coco import load_evaluation_set
from quantrack.datasets.demo import demo_folder
from quantrack.tracking.resample import resampled_runs

PICTURES = 8
ROW = {"image_id": 1, "category_id": 1, "bbox": [1.0, 1.0, 20.0, 20.0], "score": 0.9}


@pytest.fixture(scope="module")
def digest() -> str:
    return load_evaluation_set(demo_folder(), PICTURES).digest


@pytest.fixture(scope="module")
def resample_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("resample")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return mlflow.create_experiment("resample", artifact_location=(folder / "artifacts").as_uri())


def recorded(
    store: str, digest: str, mode: str, data_root: str, detections: bool = True, pictures: int = PICTURES
) -> ComparedRun:
    with mlflow.start_run(experiment_id=store) as run:
        mlflow.log_params({"data_root": data_root, "eval_images": pictures})
        if detections:
            mlflow.log_text(json.dumps([ROW]), "detections.json")
    here = Circumstances("demo-8", digest, "one2one", "640", "cpu", "a processor")
    return ComparedRun(run.info.run_id, mode, mode, "default", "small", here, {"mAP50-95": 0.5})


def test_runs_on_the_same_pictures_are_resampled_alike(resample_store: str, digest: str) -> None:
    runs = [recorded(resample_store, digest, mode, "demo") for mode in ("fp32", "w4a8")]
    first, second = resampled_runs(runs)
    assert first.resampled is not None
    assert second.resampled is not None
    assert first.resampled.shape == (1000,)
    assert (first.resampled == second.resampled).all()


def test_few_pictures_are_not_resampled(resample_store: str) -> None:
    digest = load_evaluation_set(demo_folder(), 4).digest
    runs = [recorded(resample_store, digest, mode, "demo", pictures=4) for mode in ("fp32", "w4a8")]
    assert all(run.resampled is None for run in resampled_runs(runs))


def test_a_run_alone_or_without_detections_is_left_as_it_is(resample_store: str, digest: str) -> None:
    (alone,) = resampled_runs([recorded(resample_store, digest, "fp32", "demo")])
    assert alone.resampled is None
    runs = [recorded(resample_store, digest, "fp32", "demo"), recorded(resample_store, digest, "w4a8", "demo", False)]
    first, second = resampled_runs(runs)
    assert first.resampled is not None
    assert second.resampled is None


def test_the_pictures_are_where_one_of_the_runs_found_them(resample_store: str, digest: str) -> None:
    runs = [recorded(resample_store, digest, mode, root) for mode, root in (("fp32", "nowhere"), ("w4a8", "demo"))]
    assert all(run.resampled is not None for run in resampled_runs(runs))


@pytest.mark.parametrize(
    ("data_root", "told"),
    [("nowhere", "data_root=nowhere: "), ("demo", "data_root=demo has other pictures or boxes now")],
)
def test_pictures_that_are_gone_or_changed_are_said(
    resample_store: str, data_root: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [recorded(resample_store, "d" * 64, mode, data_root) for mode in ("fp32", "w4a8")]
    assert [run.resampled for run in resampled_runs(runs)] == [None, None]
    said = capsys.readouterr().err
    assert said.count("no intervals between runs on demo-8: ") == 1
    assert told in said
