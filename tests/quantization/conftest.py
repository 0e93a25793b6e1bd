from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from quantrack.datasets.calibration import CalibrationSet, load_calibration_set
from quantrack.quantization.job import QuantizationJob
from quantrack.schemes import parse_mode


class TinyNet(nn.Module):
    """Three convolutions, one of them depthwise, with the activation that YOLO uses."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [
                nn.Conv2d(3, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
                nn.Conv2d(8, 6, 1),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model:
            x = nn.functional.silu(layer(x))
        return x


@pytest.fixture
def calibration(coco_root: Path) -> CalibrationSet:
    return load_calibration_set("random", 4, coco_root, seed=0)


@pytest.fixture
def make_job(calibration: CalibrationSet) -> Callable[[str], QuantizationJob]:
    def make(mode: str) -> QuantizationJob:
        torch.manual_seed(0)
        np.random.seed(0)
        float_model = TinyNet().eval().requires_grad_(False)
        model = TinyNet().eval().requires_grad_(False)
        model.load_state_dict(float_model.state_dict())
        return QuantizationJob(float_model, model, parse_mode(mode), calibration, 32, torch.device("cpu"), batch=3)

    return make
