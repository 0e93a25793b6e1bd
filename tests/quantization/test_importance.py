import pytest
import torch

from quantrack.detector.heads import RawOutputs
from quantrack.detector.load import load_detector
from quantrack.quantization import importance
from quantrack.quantization.importance import (
    output_importance,
    pictures_of_a_backward_pass,
    random_projection,
    with_covariance,
)


@pytest.mark.parametrize("parameters_times_pictures", [1, 10**9])
def test_every_picture_counts_alike_however_many_go_at_once(monkeypatch, parameters_times_pictures):
    model = load_detector("demo", "one2one", 64, 0, trust_checkpoint=False).model
    monkeypatch.setattr(importance, "PARAMETERS_TIMES_PICTURES", parameters_times_pictures)
    assert (pictures_of_a_backward_pass(model) == 1) == (parameters_times_pictures == 1)
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    name = "model.1.conv"
    found = output_importance(model, [name], pictures, torch.Generator().manual_seed(0), with_covariance)[name]
    channels = model.get_submodule(name).out_channels
    assert found.positions.shape == (3, 16, 16)
    assert found.positions.sum(dim=(1, 2)).tolist() == pytest.approx([1, 1, 1], rel=1e-3)
    assert found.covariance.shape == (channels, channels)
    assert float(found.covariance.trace()) == pytest.approx(3, rel=1e-3)


def test_moving_a_detection_to_the_next_position_counts_for_nothing():
    classes = torch.full((1, 2, 6, 6), -20.0)
    classes[0, 1, 2, 2:4] = torch.tensor([1.0, 0.99])  # two positions that are nearly as good
    classes.requires_grad_()
    outputs = RawOutputs(boxes=(torch.zeros(1, 4, 6, 6),), classes=(classes,), features=())
    random_projection(outputs, torch.Generator().manual_seed(0)).backward()
    here, there = classes.grad[0, 1, 2, 2:4].tolist()
    assert here == pytest.approx(there, rel=0.02)  # so what one of them gains and the other loses adds up to 0
    assert abs(here) > 100 * float(classes.grad[0, 0].abs().max())


def test_objects_count_by_their_score():
    classes = torch.tensor([-3.0, 1.0, -20.0, -20.0, 4.0, -20.0]).reshape(1, 1, 1, 6).requires_grad_()
    outputs = RawOutputs(boxes=(torch.zeros(1, 4, 1, 6),), classes=(classes,), features=())
    random_projection(outputs, torch.Generator().manual_seed(0)).backward()
    logits = classes.detach().flatten()
    weights = logits.sigmoid().sqrt()
    near_the_first = logits[:2].softmax(dim=0) * weights[1]
    found = classes.grad.flatten().abs()
    assert found[:2].tolist() == pytest.approx(near_the_first.tolist())
    assert float(found[4]) == pytest.approx(float(weights[4]))
