import pytest
import torch

from quantrack.detector.load import load_detector
from quantrack.quantization import importance
from quantrack.quantization.importance import output_importance, pictures_of_a_backward_pass, with_covariance


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
