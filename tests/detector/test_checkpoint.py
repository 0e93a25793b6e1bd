import inspect
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from quantrack.detector.checkpoint import allowed_classes, load_safely, load_trusting
from quantrack.detector.load import load_detector
from quantrack.errors import QuantrackError


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path, function: object = os.system) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> tuple[object, tuple[str]]:
        command = f"touch {self.marker}" if self.function is os.system else f"open({str(self.marker)!r}, 'w')"
        return self.function, (command,)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov10n.yaml", verbose=False)


@pytest.mark.parametrize(("function", "name"), [(os.system, "posix.system"), (eval, "builtins.eval")])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, model: nn.Module, function: object, name: str
) -> None:
    marker = tmp_path / "marker"
    torch.save({"model": model, "extra": Attack(marker, function)}, tmp_path / "evil.pt")
    with pytest.raises(QuantrackError, match=r"evil.pt: refused.*trust_checkpoint=true") as caught:
        load_safely(tmp_path / "evil.pt")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_trust_is_the_way_round(tmp_path: Path, model: nn.Module) -> None:
    torch.save({"model": model, "extra": Attack(tmp_path / "marker")}, tmp_path / "trusted.pt")
    assert isinstance(load_trusting(tmp_path / "trusted.pt"), nn.Module)
    assert (tmp_path / "marker").exists()


def test_allow_list_holds_module_classes_only() -> None:
    for kind in allowed_classes():
        assert inspect.isclass(kind)
        home = kind.__module__.split(".")[0]
        assert kind is set or home in ("torch", "ultralytics")
        assert issubclass(kind, nn.Module) or kind.__name__ in ("set", "IterableSimpleNamespace")


def test_ema_comes_first_and_half_becomes_float(tmp_path: Path, model: nn.Module) -> None:
    from ultralytics.nn.tasks import DetectionModel

    ema = DetectionModel("yolov10n.yaml", verbose=False)
    torch.save({"model": model.half(), "ema": ema.half()}, tmp_path / "both.pt")
    model.float()
    loaded = load_safely(tmp_path / "both.pt")
    weight = next(loaded.parameters())
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, next(ema.float().parameters()))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half an archive"])
def test_broken_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(QuantrackError, match=r"broken.pt: not a readable checkpoint"):
        load_safely(tmp_path / "broken.pt")


def test_truncated_file(tmp_path: Path, model: nn.Module) -> None:
    torch.save({"model": model}, tmp_path / "cut.pt")
    content = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(QuantrackError, match=r"cut.pt: not a readable checkpoint"):
        load_safely(tmp_path / "cut.pt")


def test_missing_file_and_file_without_model(tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match=r"gone.pt: no such file"):
        load_safely(tmp_path / "gone.pt")
    torch.save({"weights": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(QuantrackError, match=r"weights.pt: holds no model"):
        load_safely(tmp_path / "weights.pt")


def test_segmentation_checkpoint_is_no_detector(tmp_path: Path) -> None:
    from ultralytics.nn.tasks import SegmentationModel

    torch.save({"model": SegmentationModel("yolov8n-seg.yaml", verbose=False)}, tmp_path / "seg.pt")
    with pytest.raises(QuantrackError, match="not a detection model"):
        load_detector(str(tmp_path / "seg.pt"), "one2many", 64, 0, False)


@pytest.mark.real
@pytest.mark.parametrize(("head", "rows"), [("one2one", (1, 300, 6)), ("one2many", (1, 84, 8400))])
def test_real_checkpoint_loads_safely(real_inputs: Path, head: str, rows: tuple[int, ...]) -> None:
    detector = load_detector(str(real_inputs / "weights/yolov10n.pt"), head, 640, 0, False)
    assert len(detector.class_names) == 80
    with torch.no_grad():
        assert detector.model(torch.zeros(1, 3, 640, 640)).shape == rows
