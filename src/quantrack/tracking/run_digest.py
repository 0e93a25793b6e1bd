"""The digest of everything that decides a run's result, and finished runs found by it."""

from __future__ import annotations

import mlflow
import torch
from mlflow.entities import Run

from quantrack.datasets.calibration import CalibrationSet
from quantrack.datasets.coco import EvaluationSet
from quantrack.detector.device import resolve_device
from quantrack.detector.load import Detector
from quantrack.files import code_digests, combined_digest
from quantrack.progress import say
from quantrack.runtime.session import resolve_provider
from quantrack.schemes import parse_mode
from quantrack.settings import PtqSettings, SharedSettings, setting_texts
from quantrack.tracking.environment import cpu_name, device_name, installed_versions
from quantrack.tracking.models import fetch_plan
from quantrack.tracking.read import finished_runs, has_artifact

RUN_DIGEST, SOFTWARE = "run_digest", "software_digest"
ROOMS = ("datasets", "detector", "quantization", "onnx", "runtime", "evaluation")  # whose code decides a result
FILES = ("settings.py", "tracking/baseline.py", "tracking/quantized.py")  # what is run, beside what, in which order
BY_CONTENT = (
    "model", "data_root", "calib_list", "plan", "avg_bits", "plan_bits", "plan_by", "mode", "recipe", "device",
    "provider", "trust_checkpoint",
)  # fmt: skip


def run_digest(
    settings: SharedSettings, detector: Detector, evaluation_set: EvaluationSet, calibration: CalibrationSet | None
) -> str:
    """Equal for two runs that would measure the same on this machine.

    Files count by their content, wherever they lie; so do the code of Quantrack, the versions of the
    libraries, the processor and the provider.
    """
    no_use = () if calibration else ("calib_images",)  # a float detector is calibrated on nothing
    texts = {name: text for name, text in setting_texts(settings).items() if name not in (*BY_CONTENT, *no_use)}
    provider = resolve_provider(settings.provider)
    parts = [type(settings).__name__, repr(sorted(texts.items())), detector.digest, evaluation_set.digest]
    parts += [calibration.digest if calibration else "", provider, device_name(provider)]
    device = resolve_device(settings.device)
    parts += [str(device), cpu_name() if device.type == "cpu" else "", str(torch.get_num_threads())]
    if isinstance(settings, PtqSettings):
        recipe = settings.chosen_recipe
        parts += [parse_mode(settings.mode).name, recipe.name, recipe.text()]
        parts += [repr(fetch_plan(settings.plan).record())] if settings.plan else []
    return combined_digest([*parts, software_digest()])


def software_digest() -> str:
    """Of the libraries' versions and of the code of Quantrack that decides a result."""
    return combined_digest([repr(sorted(installed_versions().items())), *code_digests(ROOMS, FILES)])


def log_run_digest(
    settings: SharedSettings, detector: Detector, evaluation_set: EvaluationSet, calibration: CalibrationSet | None
) -> None:
    """Tag the active run, so that `compare` finds it instead of measuring the same again."""
    mlflow.set_tag(RUN_DIGEST, run_digest(settings, detector, evaluation_set, calibration))


def find_finished(digest: str) -> Run | None:
    """The newest finished run with this digest in the active run's experiment whose files are still there."""
    for run in finished_runs({RUN_DIGEST: digest}):
        if has_artifact(run.info.run_id, "onnx"):
            return run
        say(f"what run {run.info.run_id} has logged is gone; not using it")
    return None
