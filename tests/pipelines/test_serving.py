"""A registered model at work: served over HTTP by MLflow, evaluated again, and looked at with `quantrack predict`."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import mlflow
import pytest
import requests
from command import QUICK, ROOT, newest_run, run_pipeline, use_store
from mlflow.entities import Run
from typer.testing import CliRunner

from quantrack.cli import app

PICTURES = sorted((ROOT / "datasets/demo/val2017").glob("*.jpg"))[:2]
URI = "models:/served-demo@champion"
START_SECONDS, ANSWER_SECONDS = 180, 60


@pytest.fixture(scope="module")
def champion(ptq_run: Run, shared_store: Path) -> Run:
    """The W4A8 run, its model registered under an alias."""
    use_store(shared_store)
    logged = mlflow.search_logged_models(experiment_ids=[ptq_run.info.experiment_id], output_format="list")
    mine = next(model for model in logged if model.source_run_id == ptq_run.info.run_id)
    version = mlflow.register_model(f"models:/{mine.model_id}", "served-demo")
    mlflow.MlflowClient().set_registered_model_alias("served-demo", "champion", version.version)
    return ptq_run


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def post(self, **body: object) -> requests.Response:
        return requests.post(f"{self.url}/invocations", json=body, timeout=ANSWER_SECONDS)

    def refusal(self, **body: object) -> str:
        """The message of an answer that must be a 4xx with one line."""
        answer = self.post(**body)
        assert 400 <= answer.status_code < 500, answer.text
        message = str(answer.json()["message"])
        assert "\n" not in message
        assert "Traceback" not in answer.text
        assert len(answer.text) < 500
        return message


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(champion: Run, shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    served = Server(f"http://127.0.0.1:{port}", folder / "server.log")
    command = [sys.executable, "-P", "-m", "mlflow", "models", "serve", "-m", URI, "--env-manager", "local"]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{shared_store}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow starts `uvicorn`
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with served.log.open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(served, process)
        yield served
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if requests.get(f"{server.url}/ping", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.3)
    pytest.fail(f"the server did not start:\n{server.log.read_text()}")


def as_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def expected(run: Run, picture: Path, confidence: float) -> list[dict[str, object]]:
    """What the run's own evaluation found in a picture."""
    text = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/detections.json")
    found = [one for one in json.loads(text) if one["image_id"] == int(picture.stem) and one["score"] > confidence]
    return [
        {"box": [x, y, x + width, y + height], "class_id": one["category_id"], "score": one["score"]}
        for one in found
        for x, y, width, height in (one["bbox"],)
    ]


def without_names(found: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in one.items() if key != "class"} for one in found]


def test_the_server_answers_as_the_evaluation_did(champion: Run, server: Server) -> None:
    texts = [as_base64(path) for path in PICTURES]
    params = {"confidence": 0.001}
    wanted = [expected(champion, path, 0.001) for path in PICTURES]
    assert all(wanted)
    for body in (
        {"inputs": texts},
        {"instances": texts},
        {"inputs": [{"image": text} for text in texts]},
        {"dataframe_records": [{"image": text} for text in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
    ):
        answer = server.post(**body, params=params)
        assert answer.status_code == 200, answer.text
        assert [without_names(found) for found in answer.json()["predictions"]] == wanted, list(body)
    one = server.post(inputs=texts[:1]).json()["predictions"]
    assert [without_names(found) for found in one] == [expected(champion, PICTURES[0], 0.25)]
    assert all(isinstance(found["class"], str) for found in one[0])


def test_the_server_refuses_and_lives_on(server: Server, tmp_path: Path) -> None:
    good, path = as_base64(PICTURES[0]), PICTURES[0]
    first = server.post(inputs=[good])
    assert first.status_code == 200, first.text
    cut = base64.b64encode(path.read_bytes()[:2000]).decode()
    assert server.refusal(inputs=[good, cut]).startswith("item 2 of 2: truncated")
    assert "item 2 of 2" in server.refusal(dataframe_records=[{"image": good}, {"image": good[:-3] + "!"}])
    assert "empty" in server.refusal(inputs=[""])
    assert "no picture in the batch" in server.refusal(inputs=[])
    assert "texts in 1 rows of 2" in server.refusal(inputs=[[good, good]])
    assert 'lack "image"' in server.refusal(dataframe_records=[{"picture": good}])
    assert "send the picture file's bytes as base64" in server.refusal(inputs=[[[[0, 0, 0]]]])
    assert "confidence=7.0: must be between 0 and 1" in server.refusal(inputs=[good], params={"confidence": 7})
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(path.read_bytes())
    for text in (str(secret), secret.as_uri(), "https://localhost/picture.jpg", str(tmp_path / "missing.jpg")):
        assert "no path or URL is read" in server.refusal(inputs=[text])
        assert "no path or URL is read" in server.refusal(dataframe_records=[{"image": text}])
    again = server.post(inputs=[good])
    assert (again.status_code, again.json()) == (200, first.json())


def test_evaluate_the_registered_model(champion: Run, shared_store: Path) -> None:
    done = run_pipeline(shared_store, "evaluate", *QUICK, "--onnx", URI)
    assert done.returncode == 0, done.stderr
    again = newest_run(shared_store, "evaluate")
    assert again.data.metrics["mAP50-95"] == pytest.approx(champion.data.metrics["mAP50-95"])


def test_predict_draws_what_the_model_finds(champion: Run, shared_store: Path, tmp_path: Path) -> None:
    use_store(shared_store)
    (tmp_path / "other").mkdir()
    twin, broken, out = tmp_path / "other" / PICTURES[0].name, tmp_path / "broken.jpg", tmp_path / "out"
    twin.write_bytes(PICTURES[1].read_bytes())
    broken.write_bytes(b"\xff\xd8\xff half")
    inputs = [str(path) for path in (PICTURES[0], broken, twin)]
    done = CliRunner().invoke(app, ["predict", *inputs, "--model", URI, "--out", str(out), "--confidence", "0.3"])
    assert done.exit_code == 1, done.output
    name = PICTURES[0].stem
    assert sorted(path.name for path in out.iterdir()) == [f"{name}-2.png", f"{name}.png", "detections.json"]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [inputs[0], inputs[2]]
    assert lines[0].endswith(f"-> {out / name}.png")
    found = json.loads((out / "detections.json").read_text())
    assert [row["image"] for row in found] == [inputs[0], inputs[2]]
    assert [row["drawn"] for row in found] == [f"{name}.png", f"{name}-2.png"]
    for row, picture in zip(found, PICTURES, strict=True):
        assert without_names(row["detections"]) == expected(champion, picture, 0.3)
        assert cv2.imread(str(out / row["drawn"])).shape == cv2.imread(str(picture)).shape
