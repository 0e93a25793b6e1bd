"""Run all steps on the other device: python quantize_there.py LIBRARY; started by test_other_device.py."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from recipes import with_fewer_trials

from quantrack.datasets.calibration import load_calibration_set
from quantrack.datasets.demo import demo_folder
from quantrack.detector.load import load_auxiliary_head, load_detector
from quantrack.quantization.activation_ranges import MseActivationRanges, PercentileActivationRanges
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.block_reconstruction import BlockReconstruction
from quantrack.quantization.distillation import Distillation
from quantrack.quantization.fit_pair_sums import FitPairSums
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import QuantizationJob, Step, new_job
from quantrack.quantization.observe_activations import ObserveActivations
from quantrack.quantization.qat import Qat, new_student, take_over_student
from quantrack.quantization.recipe import CALIBRATED, RECIPES
from quantrack.quantization.weight_scales import MinMaxWeightScales, PercentileWeightScales
from quantrack.schemes import parse_mode

SMALL = str(Path(__file__).parents[1] / "small/small.pt")
IMGSZ = 128
NAME = "other"


def load(library: str) -> torch.device:
    """Make the device known to PyTorch under its name."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module = ModuleType(f"torch.{NAME}")
    answers: dict[str, object] = {"is_available": True, "device_count": 1, "current_device": 0}
    answers |= {"_is_in_bad_fork": False, "get_amp_supported_dtype": [torch.bfloat16]}
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.Tensor.__deepcopy__ = _copied  # PyTorch's copies storages in a way that only its own devices know
    return torch.device(NAME)


_copied_by_torch = torch.Tensor.__deepcopy__


def _copied(tensor: torch.Tensor, memo: dict[int, object]) -> torch.Tensor:
    if tensor.device.type != NAME:
        return _copied_by_torch(tensor, memo)
    copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


def small_job(mode: str, device: torch.device) -> QuantizationJob:
    """A small detector, and three pictures in batches of two."""
    detector = load_detector(SMALL, "one2one", IMGSZ, 0, False)
    calibration = load_calibration_set("random", 3, demo_folder(), seed=0)
    return replace(new_job(detector, parse_mode(mode), calibration, IMGSZ, device, 0), batch=2)


def train_once(job: QuantizationJob) -> None:
    """One step of quantization-aware training, on both heads and from the float detector."""
    student = new_student(job, Qat(0.01, 0.001, 3.0), load_auxiliary_head(SMALL, 0, False)).to(job.device)
    student.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=2)
    optimizer = torch.optim.Adam(Qat(0.01, 0.001, 3.0).groups(student))
    labels = {"batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.zeros(2, 1), "bboxes": torch.full((2, 4), 0.5)}
    student.train()
    loss, _ = student({"img": next(job.batches()), **{name: of.to(job.device) for name, of in labels.items()}})
    loss.backward()
    optimizer.step()
    take_over_student(job, student.eval())


def main() -> None:
    device = load(sys.argv[1])
    others: tuple[Step, ...] = (
        InsertQuantizers(activation="symmetric"), ObserveActivations(), MinMaxWeightScales(), PercentileWeightScales(),
        PercentileActivationRanges(), MseActivationRanges(), Gptq(inputs="quantized", fit_pairs=True), BiasCorrection(),
    )  # fmt: skip
    recipes: list[tuple[str, tuple[Step, ...]]] = [
        ("w4a8", with_fewer_trials(RECIPES["best"])),  # all that `default` does, and covariances
        ("w8a8", with_fewer_trials(others)),
        ("w8a8", (*RECIPES["fast"], FitPairSums(), BiasCorrection())),
        ("w4a8", (*CALIBRATED, BlockReconstruction(iterations=1), Distillation(1, 2, mixed_precision=False))),
    ]
    for mode, steps in recipes:
        job = small_job(mode, device)
        apply_recipe(job, steps)
        apart = {name for name, of in job.model.state_dict().items() if of.device.type != NAME}
        assert not apart, apart
    train_once(job)


if __name__ == "__main__":
    main()
