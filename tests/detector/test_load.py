import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from quantrack.detector.load import load_detector
from quantrack.detector.roles import Role, convolution_roles
from quantrack.errors import QuantrackError, UsageError


@pytest.mark.parametrize(
    ("architecture", "head", "shape"),
    [
        ("yolov10n.yaml", "one2one", (1, 84, 6)),
        ("yolov10n.yaml", "one2many", (1, 84, 84)),
        ("yolov8n.yaml", "one2many", (1, 84, 84)),
        ("yolov9t.yaml", "one2many", (1, 84, 84)),
        ("yolo11n.yaml", "one2many", (1, 84, 84)),
        ("yolo26n.yaml", "one2one", (1, 84, 6)),
    ],
)
def test_architectures(architecture: str, head: str, shape: tuple[int, ...]) -> None:
    detector = load_detector(architecture, head, 64, 0, False)
    with torch.no_grad():
        output = detector.model(torch.rand(1, 3, 64, 64))
    assert output.shape == shape
    assert detector.name == architecture.removesuffix(".yaml")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.model.modules())
    assert not any(parameter.requires_grad for parameter in detector.model.parameters())


def test_seed_decides_weights_and_digest() -> None:
    first, same, other = (load_detector("yolov10n.yaml", "one2one", 64, seed, False) for seed in (0, 0, 1))
    weights = [next(detector.model.parameters()) for detector in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.digest == same.digest != other.digest


def test_a_copy_computes_the_same() -> None:
    detector = load_detector("yolov10n.yaml", "one2many", 64, 0, False)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(detector.model)(image), detector.model(image))


@pytest.mark.parametrize("head", ["one2one", "one2many"])
def test_roles_by_structure(head: str) -> None:
    roles = Counter(convolution_roles(load_detector("yolov10n.yaml", head, 64, 0, False).model).values())
    assert roles == {
        Role.FIRST: 1,
        Role.HEAD_OUTPUT: 6,
        Role.DFL: 1,
        Role.DEPTHWISE: 13,
        Role.ATTENTION: 2,
        Role.BODY: 60,
    }


def test_no_dfl_where_the_architecture_has_none() -> None:
    roles = convolution_roles(load_detector("yolo26n.yaml", "one2one", 64, 0, False).model)
    assert Role.DFL not in roles.values()


@pytest.mark.parametrize(
    ("source", "head", "imgsz", "kind", "message"),
    [
        ("yolov8n.yaml", "one2one", 64, UsageError, "no one-to-one head; use head=one2many"),
        ("yolov10n.yaml", "one2one", 65, UsageError, "imgsz=65: must be a multiple of 32"),
        ("yolov8n-seg.yaml", "one2many", 64, QuantrackError, "a segment model"),
        ("nothing.yaml", "one2many", 64, QuantrackError, "no such architecture"),
        ("nothing.pt", "one2many", 64, QuantrackError, "no model that Ultralytics publishes"),
        ("folder/nothing.pt", "one2many", 64, QuantrackError, "no such file"),
    ],
)
def test_refusals(source: str, head: str, imgsz: int, kind: type[QuantrackError], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_detector(source, head, imgsz, 0, False)


def test_published_name_offline_names_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ultralytics.utils import downloads

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setenv("QUANTRACK_CACHE", str(tmp_path))
    monkeypatch.setattr(downloads, "attempt_download_asset", offline)
    with pytest.raises(QuantrackError, match=r"yolov10m.pt: not here and cannot be downloaded.*model=demo"):
        load_detector("yolov10m.pt", "one2one", 64, 0, False)


@pytest.mark.parametrize("present", [True, False])
def test_users_ultralytics_settings_are_left_as_found(tmp_path: Path, present: bool) -> None:
    settings = tmp_path / "config/Ultralytics/settings.json"
    if present:
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps({"sync": True, "odd": 1}))
    before = settings.read_bytes() if present else None
    code = (
        "from quantrack.detector.load import load_detector; import os;"
        "load_detector('yolov10n.yaml', 'one2one', 64, 0, False);"
        "from ultralytics.utils import AUTOINSTALL, SETTINGS;"
        "assert not AUTOINSTALL; assert not SETTINGS['sync']"
    )
    environment = {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "QUANTRACK_CACHE": str(tmp_path / "cache"),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (settings.read_bytes() if settings.exists() else None) == before
