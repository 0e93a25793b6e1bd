from pathlib import Path

import pytest
import torch
from command import SMALL

from quantrack.datasets.calibration import CalibrationSet, load_calibration_set
from quantrack.datasets.demo import demo_calibration_list, demo_folder
from quantrack.detector.load import load_detector
from quantrack.detector.roles import Role, convolution_roles
from quantrack.onnx.exported_files import ExportedFiles, export_quantized_files
from quantrack.onnx.inspect import ModelFacts
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.bit_plan import BitPlan
from quantrack.quantization.job import QuantizationJob, new_job
from quantrack.quantization.recipe import parse_recipe, recipe_for
from quantrack.schemes import Variant, parse_mode


class Small:
    """The small detector, trained, at 160 px and quantized by the fast recipe: made once a mode."""

    SIZE = 160

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calibration: CalibrationSet = load_calibration_set(str(demo_calibration_list()), 2, demo_folder(), seed=0)
        self._made: dict[tuple[str, str, str, str, str], ExportedFiles] = {}

    def facts(self, mode: str, head: str) -> ModelFacts:
        return ModelFacts("small", "digest", head, self.SIZE, mode, "fast", ("cat", "dog"), 4.5)

    def files(
        self,
        mode: str,
        head: str = "one2one",
        recipe: str = "fast",
        placement: str = "inputs",
        channels: bool = False,
    ) -> ExportedFiles:
        """The files that a recipe gives; with another placement, those that it can be made of.

        With `channels` their weights have 3, 4, 5 and 8 bits, by turns.
        """
        key = (mode, head, recipe, placement, "channels" if channels else "roles")
        if key not in self._made:
            detector = load_detector(SMALL, head, self.SIZE, 0, False)
            job = new_job(detector, parse_mode(mode), self.calibration, self.SIZE, torch.device("cpu"), seed=0)
            job.plan = mixed_channels(job) if channels else None
            apply_recipe(job, recipe_for(Variant(placement=placement), parse_recipe(recipe)).steps)
            folder = self.folder / "-".join(key)
            folder.mkdir()
            self._made[key] = export_quantized_files(job.model, self.facts(mode, head), folder)
        return self._made[key]


def mixed_channels(job: QuantizationJob) -> BitPlan:
    """A plan in which the output channels of every convolution have 3, 4, 5 and 8 bits by turns."""
    layers = {name: role for name, role in convolution_roles(job.model).items() if role is not Role.DFL}
    counts = {name: job.model.get_submodule(name).out_channels for name in layers}
    return BitPlan(job.model_digest, {name: tuple((3, 4, 5, 8)[c % 4] for c in range(n)) for name, n in counts.items()})


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small"))
