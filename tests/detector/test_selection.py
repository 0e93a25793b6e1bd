import copy

import pytest
import torch

from quantrack.detector.load import load_detector
from quantrack.detector.selection import _distances


@pytest.mark.parametrize("source", ["yolov10n", "yolo26n"])
def test_selecting_first_gives_what_ultralytics_gives(source):
    """The distribution of YOLOv10's boxes, and YOLO26's plain distances; two pictures, other sizes after."""
    model = load_detector(f"{source}.yaml", "one2one", 128, 0, trust_checkpoint=False).model
    original = copy.deepcopy(model)
    head = original.model[-1]
    head.__class__ = type(head).__mro__[1]
    assert head.__class__.__module__.startswith("ultralytics")
    head.shape = None  # its anchors are kept in the other orientation
    for size in (128, 160):
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            found, expected = model(images), original(images)
        assert found.shape == expected.shape
        # random weights give many equal scores, whose order is free; sorted scores and the best rows are not
        torch.testing.assert_close(found[..., 4], expected[..., 4])
        torch.testing.assert_close(found[:, 0], expected[:, 0])


@pytest.mark.parametrize(("source", "bins"), [("yolov10n", 64), ("yolo26n", 4)])
def test_distances_are_those_of_the_head(source, bins):
    head = load_detector(f"{source}.yaml", "one2one", 64, 0, trust_checkpoint=False).model.model[-1]
    taken = 8 * torch.randn(2, bins, 5, generator=torch.Generator().manual_seed(0))
    expected = head.dfl(taken)
    assert expected.std() > 1
    torch.testing.assert_close(_distances(head, taken), expected)


def test_a_copy_keeps_the_order():
    model = load_detector("yolov10n.yaml", "one2one", 64, 0, trust_checkpoint=False).model
    assert type(copy.deepcopy(model).model[-1]) is type(model.model[-1])


def test_one_to_many_heads_stay_as_they_are():
    model = load_detector("yolov10n.yaml", "one2many", 64, 0, trust_checkpoint=False).model
    assert type(model.model[-1]).__module__.startswith("ultralytics")
