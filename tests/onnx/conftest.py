from pathlib import Path

import pytest
import torch

from quantrack.datasets.calibration import CalibrationSet, load_calibration_set
from quantrack.datasets.demo import demo_calibration_list, demo_folder
from quantrack.detector.load import load_detector
from quantrack.onnx.files import ExportedFiles, export_quantized_files
from quantrack.onnx.inspect import ModelFacts
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.job import new_job
from quantrack.quantization.recipe import parse_recipe, recipe_for
from quantrack.schemes import parse_mode


class Small:
    """The demo detector, a trained YOLOv10n, at 160 px and quantized by the fast recipe: made once a mode."""

    SIZE = 160

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calibration: CalibrationSet = load_calibration_set(str(demo_calibration_list()), 2, demo_folder(), seed=0)
        self._made: dict[tuple[str, str, str, str], ExportedFiles] = {}

    def facts(self, mode: str, head: str) -> ModelFacts:
        return ModelFacts("small", "digest", head, self.SIZE, mode, "fast", ("cat", "dog"), 4.5)

    def files(self, mode: str, head: str = "one2one", recipe: str = "fast", placement: str = "inputs") -> ExportedFiles:
        """The files that a recipe gives; with another placement, those that it can be made of."""
        key = (mode, head, recipe, placement)
        if key not in self._made:
            detector = load_detector("demo", head, self.SIZE, 0, False)
            job = new_job(detector, parse_mode(mode), self.calibration, self.SIZE, torch.device("cpu"), seed=0)
            apply_recipe(job, recipe_for({"target": "onnxruntime", "placement": placement}, parse_recipe(recipe)).steps)
            folder = self.folder / "-".join(key)
            folder.mkdir()
            self._made[key] = export_quantized_files(job.model, self.facts(mode, head), folder)
        return self._made[key]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small"))
