import os
import pathlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from quantrack.detector.checkpoint import allowed_classes, load_safely, load_trusting
from quantrack.detector.ultralytics_setup import prepare
from quantrack.errors import QuantrackError


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def refusal(path: Path) -> str:
    with pytest.raises(QuantrackError) as caught:
        load_safely(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def build(name: str = "yolov10n.yaml") -> nn.Module:
    prepare()
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(name, verbose=False)


def test_command_in_pickle_is_refused_not_run(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"model": Calls(os.system, f"touch {marker}")}, path)
    message = refusal(path)
    assert "system" in message
    assert "trust_checkpoint=true" in message
    assert not marker.exists()


@pytest.mark.parametrize("function", [getattr, eval, __import__])
def test_functions_are_refused(tmp_path, function):
    torch.save({"model": Calls(function, "1", "real")}, tmp_path / "evil.pt")
    assert function.__name__ in refusal(tmp_path / "evil.pt")


@pytest.mark.parametrize("registered", [False, True])
def test_listed_class_cannot_be_called(tmp_path, registered):
    """Ultralytics' models evaluate the `activation` text they are constructed with."""
    prepare()
    from ultralytics.nn.tasks import DetectionModel

    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    description = {"nc": 1, "activation": code, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": []}
    torch.save({"model": Calls(DetectionModel, description)}, path)
    with torch.serialization.safe_globals([DetectionModel] if registered else []):  # by anyone else
        before = set(torch.serialization.get_safe_globals())
        assert "calls ultralytics.nn.tasks.DetectionModel" in refusal(path)
        assert set(torch.serialization.get_safe_globals()) == before
    assert not marker.exists()


@pytest.mark.parametrize("alias", ["ultralytics/nn/tasks/DetectionModel", "ultralytics.nn/tasks/DetectionModel"])
def test_real_class_cannot_be_named(tmp_path, alias):
    """The names under which torch knows the real classes are out of a pickle's reach."""
    prepare()
    from ultralytics.nn.tasks import DetectionModel

    path, edited = tmp_path / "good.pt", tmp_path / "evil.pt"
    torch.save({"model": DetectionModel.__new__(DetectionModel), "call": Calls(DetectionModel, {})}, path)
    rewrite_pickle(path, edited, b"cultralytics.nn.tasks\nDetectionModel\n", b"c" + alias.encode() + b"\n\n")
    assert refusal(edited)


def rewrite_pickle(source: Path, target: Path, old: bytes, new: bytes) -> None:
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for entry in before.namelist():
            content = before.read(entry)
            if entry.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            after.writestr(entry, content)


def test_only_classes_are_allowed():
    assert all(isinstance(kind, type) for kind in allowed_classes())


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_broken_file(tmp_path, damage):
    path = tmp_path / "broken.pt"
    torch.save({"model": nn.Linear(64, 64)}, path)
    content = {"truncated": path.read_bytes()[:9000], "text": b"not a checkpoint", "empty": b""}[damage]
    path.write_bytes(content)
    assert "not a readable checkpoint" in refusal(path)
    with pytest.raises(QuantrackError, match="not a readable checkpoint"):
        load_trusting(path)


def test_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.pt")


def test_no_model_inside(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "odd.pt")
    assert "holds no model" in refusal(tmp_path / "odd.pt")


def test_averaged_weights_come_first_and_float(tmp_path):
    content = {"model": nn.Linear(2, 2).half(), "ema": nn.Linear(2, 3).half()}
    torch.save(content, tmp_path / "both.pt")
    model = load_safely(tmp_path / "both.pt")
    assert model.out_features == 3
    assert model.weight.dtype == torch.float32
    assert not model.training


def test_training_checkpoint_with_plain_data(tmp_path):
    """What trainers keep beside the model: settings, paths, NumPy numbers, the loss."""
    prepare()
    from ultralytics.utils import IterableSimpleNamespace

    model = build()
    model.args = IterableSimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=1, save_dir=pathlib.Path("/runs"))
    model.criterion = model.init_criterion()
    torch.save({"model": model, "best_fitness": np.float64(0.5), "classes": {1, 2}}, tmp_path / "train.pt")
    loaded = load_safely(tmp_path / "train.pt")
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_older_names(tmp_path):
    """The class name that the first YOLOv10 checkpoints carry."""
    torch.save({"model": build()}, tmp_path / "new.pt")
    old = b"cultralytics.nn.tasks\nYOLOv10DetectionModel\n"
    rewrite_pickle(tmp_path / "new.pt", tmp_path / "old.pt", b"cultralytics.nn.tasks\nDetectionModel\n", old)
    assert type(load_safely(tmp_path / "old.pt")).__name__ == "DetectionModel"


SETTINGS_CODE = "import quantrack.detector.ultralytics_setup as e; e.prepare(); from ultralytics.utils import SETTINGS"


@pytest.mark.parametrize(("exists", "first"), [(True, ""), (False, ""), (True, "import ultralytics; ")])
def test_settings_file_of_the_user_is_untouched(tmp_path, exists, first):
    settings = tmp_path / ".config/Ultralytics/settings.json"
    inherited = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
    environment = {name: os.environ[name] for name in inherited if name in os.environ}
    environment |= {"HOME": str(tmp_path), "YOLO_OFFLINE": "true"}
    if exists:  # written by Ultralytics itself, then loaded by us
        subprocess.run([sys.executable, "-c", "import ultralytics"], env=environment, check=True, timeout=120)
        before = settings.read_bytes()
    code = first + SETTINGS_CODE + "; print(SETTINGS['sync'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "False"
    assert settings.read_bytes() == before if exists else not settings.exists()


@pytest.mark.real
def test_official_weights_load_safely(real_inputs):
    model = load_safely(real_inputs / "weights/yolov10n.pt")
    assert type(model).__name__ == "DetectionModel"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_class_of_a_script_is_refused_in_one_line(tmp_path):
    script = "import sys, torch\nclass Net(torch.nn.Module): pass\ntorch.save({'model': Net()}, sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "own.pt")], check=True)
    assert "its pickle holds __main__.Net of a project that is not installed here" in refusal(tmp_path / "own.pt")


@pytest.mark.parametrize("load", [load_safely, load_trusting])
def test_a_checkpoint_of_another_project_says_so(tmp_path, load, monkeypatch):
    """Such as the first YOLOv5's; neither trust nor fetching it again helps."""
    elsewhere = ModuleType("models_elsewhere")
    elsewhere.Model = type("Model", (nn.Module,), {"__module__": "models_elsewhere"})
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "models_elsewhere", elsewhere)
        torch.save({"model": elsewhere.Model()}, tmp_path / "yolov5n.pt")
    with pytest.raises(QuantrackError, match=r"models_elsewhere.* of a project that is not installed here; give a che"):
        load(tmp_path / "yolov5n.pt")
