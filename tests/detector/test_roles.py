from collections import Counter

import pytest
from torch import nn

from quantrack.detector.heads import head_levels
from quantrack.detector.load import load_detector
from quantrack.detector.roles import Role, convolution_roles


def load(source: str, head: str = "one2many") -> nn.Module:
    return load_detector(source, head, 64, 0, trust_checkpoint=False).model


@pytest.mark.parametrize("head", ["one2one", "one2many"])
def test_yolov10n(head):
    model = load("yolov10n.yaml", head)
    roles = convolution_roles(model)
    counts = Counter(roles.values())
    assert (counts[Role.FIRST], counts[Role.HEAD_OUTPUT], counts[Role.DFL]) == (1, 6, 1)
    assert counts[Role.ATTENTION] == 2  # qkv and proj; pe is depthwise
    assert set(roles) == {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    outputs = [(level.boxes, level.classes) for level in head_levels(model)]
    assert {name for name, role in roles.items() if role is Role.HEAD_OUTPUT} == {n for pair in outputs for n in pair}
    inner = "one2one_" if head == "one2one" else ""
    assert outputs == [(f"model.23.{inner}cv2.{level}.2", f"model.23.{inner}cv3.{level}.2") for level in range(3)]


def test_a_second_stem_reads_the_picture_as_well():
    first = [name for name, role in convolution_roles(load("yolov9e.yaml")).items() if role is Role.FIRST]
    assert first == ["model.1.conv", "model.15.conv"]


@pytest.mark.parametrize("source", ["yolov8n", "yolo11n", "yolov9t", "yolo26n"])
def test_other_detectors(source):
    model = load(f"{source}.yaml")
    roles = convolution_roles(model)
    counts = Counter(roles.values())
    assert (counts[Role.FIRST], counts[Role.HEAD_OUTPUT]) == (1, 6)
    assert counts[Role.DFL] == (0 if source == "yolo26n" else 1)
    assert next(iter(roles.values())) is Role.FIRST
    modules = dict(model.named_modules())
    assert {modules[level.classes].out_channels for level in head_levels(model)} == {80}
    assert {modules[level.boxes].out_channels for level in head_levels(model)} == {4 if source == "yolo26n" else 64}
    for name, role in roles.items():
        if role is Role.DEPTHWISE:
            assert modules[name].groups == modules[name].in_channels > 1


def test_model_without_convolutions():
    assert convolution_roles(nn.Linear(2, 2)) == {}
