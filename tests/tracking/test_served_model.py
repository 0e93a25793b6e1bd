"""The logged model in Python: every form of a batch, its files, and a process that knows nothing of this project."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pandas as pd
import pytest
from command import SMALL

from quantrack.datasets.coco import EvaluationSet, load_evaluation_set
from quantrack.datasets.demo import demo_folder
from quantrack.detector.load import load_detector
from quantrack.evaluation.measure import detect
from quantrack.evaluation.types import Detection
from quantrack.onnx.exported_files import export_float_files
from quantrack.runtime.session import open_session
from quantrack.tracking.detector_flavor import SERVED_CODE
from quantrack.tracking.models import fetch_onnx, log_model
from quantrack.tracking.result import detector_facts
from quantrack.tracking.served_model import SERVER_MARKS, PredictionError

Record = dict[str, object]
SIZE = 128  # small, so that the export is quick
EVERYTHING = {"confidence": 0.001}


@dataclass(frozen=True)
class Logged:
    """A logged model, the file it was made of, and what the evaluation finds with that file."""

    uri: str
    head: str
    onnx: Path
    evaluation_set: EvaluationSet
    detections: tuple[Detection, ...]

    @property
    def pictures(self) -> list[Path]:
        return [picture.path for picture in self.evaluation_set.pictures]

    def expected(self) -> list[list[tuple[int, float, tuple[float, ...]]]]:
        return [
            [(d.category_id, d.score, corners(d)) for d in self.detections if d.image_id == picture.id]
            for picture in self.evaluation_set.pictures
        ]


def corners(found: Detection) -> tuple[float, ...]:
    x, y, width, height = found.xywh
    return x, y, x + width, y + height


def plain(result: list[list[Record]]) -> list[list[tuple[object, ...]]]:
    return [[(one["class_id"], one["score"], tuple(one["box"])) for one in found] for found in result]  # type: ignore[arg-type]


def log(model: str, root: Path, pictures: int, head: str, folder: Path, imgsz: int = SIZE) -> Logged:
    evaluation_set = load_evaluation_set(root, pictures)
    detector = load_detector(model, head, imgsz, 0, False)
    facts = detector_facts(detector, evaluation_set, imgsz, "fp32", "float")
    onnx = export_float_files(detector.model, facts, folder).optimized
    session = open_session(onnx, "cpu")
    detections = detect(session.run, imgsz, evaluation_set, head)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    # not set_experiment: it would stay set for the tests that follow
    experiment = mlflow.create_experiment("served", artifact_location=str(folder / "artifacts"))
    with mlflow.start_run(experiment_id=experiment):
        log_model(onnx, "served", {"mAP50-95": 0.5}, evaluation_set)
        # again, as a training does that was interrupted here, of a checkpoint whose name MLflow would refuse
        log_model(onnx, "best-v1.2 50% w4a8", {"mAP50-95": 0.5}, evaluation_set)
    (model,) = mlflow.search_logged_models(experiment_ids=[experiment], output_format="list")
    assert model.name == "best-v1-2-50-w4a8"
    model_id = model.model_id
    return Logged(f"models:/{model_id}", head, onnx, evaluation_set, detections)


@pytest.fixture(scope="module", params=["one2one", "one2many"])
def logged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    return log(SMALL, demo_folder(), 3, request.param, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def model(logged: Logged) -> Iterator[mlflow.pyfunc.PyFuncModel]:
    before = list(sys.path)
    yield mlflow.pyfunc.load_model(logged.uri)
    sys.path[:] = before  # MLflow puts the model's code first


def test_detections_are_the_evaluations(logged: Logged, model: mlflow.pyfunc.PyFuncModel) -> None:
    result = model.predict([str(path) for path in logged.pictures], params=EVERYTHING)
    assert plain(result) == logged.expected()
    names = {category.id: category.name for category in logged.evaluation_set.categories}
    assert all(one["class"] == names[one["class_id"]] for found in result for one in found)
    assert json.loads(json.dumps(result)) == result


def test_parameters(logged: Logged, model: mlflow.pyfunc.PyFuncModel) -> None:
    picture = str(logged.pictures[0])
    everything = logged.expected()[0]
    assert plain(model.predict(picture)) == [[one for one in everything if one[1] > 0.25]]
    assert plain(model.predict(picture, params=EVERYTHING | {"max_detections": 2})) == [everything[:2]]
    for wrong in ({"confidence": 2}, {"max_detections": 0}):
        with pytest.raises(PredictionError, match="must be"):
            model.predict(picture, params=wrong)


def test_every_form_of_a_batch(logged: Logged, model: mlflow.pyfunc.PyFuncModel) -> None:
    pictures = logged.pictures[:2]
    texts = [base64.b64encode(path.read_bytes()).decode() for path in pictures]
    arrays = [cv2.imread(str(path))[:, :, ::-1] for path in pictures]
    one, two = (plain(model.predict([path], params=EVERYTHING))[0] for path in pictures)
    batches = [
        pictures, texts, arrays, [path.read_bytes() for path in pictures], [pictures[0], arrays[1]], np.array(texts),
        np.array(texts, dtype=object), {"image": texts}, {"image": np.array(texts)}, pd.DataFrame({"image": texts}),
        [{"image": text} for text in texts], pd.DataFrame({"image": texts, "note": ["", ""]}, index=[5, 7]),
        pd.Series(texts), np.array([[text] for text in texts]), [{"image": np.array(text)} for text in texts],
        np.array([*arrays, None], dtype=object)[:2],
    ]  # fmt: skip
    for batch in batches:
        assert plain(model.predict(batch, params=EVERYTHING)) == [one, two], type(batch)
    for single in (pictures[0], str(pictures[0]), texts[0], pictures[0].read_bytes(), arrays[0], np.array(texts[0])):
        assert plain(model.predict(single, params=EVERYTHING)) == [one], type(single)
    assert plain(model.predict(np.stack([arrays[0]] * 2), params=EVERYTHING)) == [one, one]


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ([b"", b""], "item 1 of 2: empty"),
        ([np.zeros((9, 9, 3), np.uint8), b"<html>"], "item 2 of 2: not a JPEG"),
        (np.zeros((9, 9), np.uint8), "item 1 of 1: array of uint8 with shape"),
        (pd.DataFrame({"picture": ["x"]}), 'lack "image"; send'),
        ([{"picture": "x"}], 'lack "image"; send'),
        (pd.DataFrame({"image": [None]}), "item 1 of 1: "),
        (pd.DataFrame([["x", "y"]], columns=["image", "image"]), 'more than one column "image"; send'),
        (np.array([["x", "y"]]), "texts in 1 rows of 2, not one by one; send"),
        ([], "no picture in the batch"),
        (np.array([]), "no picture in the batch"),
    ],
)
def test_refused_batches(model: mlflow.pyfunc.PyFuncModel, batch: object, reason: str) -> None:
    with pytest.raises(PredictionError, match=reason) as refused:
        model.predict(batch)
    assert refused.value.get_http_status_code() == 400
    refused.value.message = f"Failed to predict data '{batch}'.\nError: ..."  # as the scoring server does
    message = json.loads(refused.value.serialize_as_json())["message"]
    assert message == str(refused.value)
    assert "\n" not in message


@pytest.mark.parametrize("mark", SERVER_MARKS)
def test_a_server_reads_no_paths(
    logged: Logged, model: mlflow.pyfunc.PyFuncModel, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    monkeypatch.setenv(mark, "true")
    path = logged.pictures[0]
    for source in (str(path), path, path.read_bytes(), cv2.imread(str(path))):
        with pytest.raises(PredictionError, match=r"item 1 of 1: .*base64"):
            model.predict([source])
    assert model.predict([base64.b64encode(path.read_bytes()).decode()])


def test_threads_share_the_session(logged: Logged, model: mlflow.pyfunc.PyFuncModel) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda path: model.predict(path, params=EVERYTHING), logged.pictures * 4))
    assert [plain(result)[0] for result in results] == logged.expected() * 4


def test_files_of_the_model(logged: Logged, tmp_path: Path) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(logged.uri, dst_path=str(tmp_path / "model")))
    code = {str(path.relative_to(folder / "code/quantrack")) for path in (folder / "code").rglob("*") if path.is_file()}
    assert code == set(SERVED_CODE)
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files <= {
        "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json",
        "serving_input_example.json", "registered_model_meta",
    }  # fmt: skip
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in requirements)
    assert not [line for line in requirements if line.startswith(("brevitas", "ultralytics"))]
    assert [path.read_bytes() for path in folder.rglob("*.onnx")] == [logged.onnx.read_bytes()]
    assert fetch_onnx(logged.uri, tmp_path / "fetched").read_bytes() == logged.onnx.read_bytes()
    assert mlflow.onnx.load_model(logged.uri).graph.node
    assert mlflow.models.get_model_info(logged.uri).signature.params.to_dict()[0]["name"] == "confidence"


ALONE = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
result = model.predict(sys.argv[2])
heavy = [name for name in ("brevitas", "ultralytics", "pycocotools", "onnxslim") if name in sys.modules]
loaded = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "quantrack"}
print(json.dumps({"result": result, "heavy": heavy, "loaded": loaded}))
"""


def test_a_process_that_knows_nothing_of_the_project(logged: Logged, tmp_path: Path) -> None:
    if logged.head == "one2many":
        pytest.skip("one head is enough")
    mlflow.artifacts.download_artifacts(logged.uri, dst_path=str(tmp_path / "model"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, "model", str(logged.pictures[0])],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True, env={"MLFLOW_DISABLE_TELEMETRY": "true"},
    )  # fmt: skip
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["heavy"] == []
    assert all(path.startswith(str(tmp_path / "model/code/quantrack")) for path in said["loaded"].values())
    assert {str(Path(path).relative_to(tmp_path / "model/code/quantrack")) for path in said["loaded"].values()} == set(
        SERVED_CODE
    )
    assert plain(said["result"]) == [[one for one in logged.expected()[0] if one[1] > 0.25]]


@pytest.mark.real
def test_real_pictures_and_weights(real_inputs: Path, tmp_path: Path) -> None:
    before = list(sys.path)
    found = log(str(real_inputs / "weights/yolov10n.pt"), real_inputs / "coco2017", 3, "one2one", tmp_path, 640)
    result = mlflow.pyfunc.load_model(found.uri).predict(found.pictures, params=EVERYTHING)
    sys.path[:] = before
    assert plain(result) == found.expected()
    assert any(one["class"] == "tv" and one["class_id"] == 72 for one in result[0])  # COCO's id, not the class index
