"""`quantrack predict` before any model is opened; tests/pipelines/test_serving.py has it at work."""

import os
import sys
from pathlib import Path

import pytest
from command import ROOT
from typer.testing import CliRunner

from quantrack.cli import _tell, app, output_paths
from quantrack.errors import UsageError


def test_no_two_pictures_share_a_name(tmp_path: Path) -> None:
    images = [
        Path("a/street.jpg"),
        Path("b/street.jpg"),
        Path("street.png"),
        Path("street-2.jpg"),
        Path("a/street.jpg"),
    ]
    names = [path.name for path in output_paths(images, tmp_path)]
    assert names == ["street.png", "street-2.png", "street-3.png", "street-2-2.png", "street-4.png"]


def test_no_picture_is_drawn_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    images = [Path("street.jpg"), Path("street.png")]
    for out in (Path(), tmp_path, Path("link")):
        assert [path.name for path in output_paths(images, out)] == ["street-2.png", "street-3.png"]
    with pytest.raises(UsageError, match=r"detections.json: would be overwritten"):
        output_paths([Path("detections.json")], Path("link"))


def test_whoever_stops_reading_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `quantrack predict ... | head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        _tell("one")
        _tell("two")


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (("--model", "x.onnx", "--out", "out", "--confidence", "1.5"), 2, "confidence=1.5: must be between 0 and 1"),
        (("--model", "x.onnx", "--out", "out", "--provider", "tpu"), 2, "provider=tpu: unknown provider"),
        (("--model", "x.onnx", "--out", "file"), 2, "out=file: is a file"),
        (("--model", "x.onnx", "--out", "out"), 1, "model=x.onnx: no such file"),
        (("--model", "file", "--out", "out"), 1, "not a readable ONNX file"),
        (("--out", "out"), 2, "--model"),
    ],
)
def test_refusals(
    options: tuple[str, ...], code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not ONNX")
    done = CliRunner().invoke(app, ["predict", str(ROOT / "docs/mlflow-run.png"), *options])
    assert done.exit_code == code
    assert reason in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()
