"""What a result was measured on: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from quantrack.detector.device import processor_name
from quantrack.quantization.step_cache import LIBRARIES
from quantrack.runtime.session import CPU, usable_cores

PACKAGES = (
    "quantrack", "mlflow", "onnx", "onnxoptimizer", "onnxruntime-gpu", "onnxslim", "pycocotools", "torchvision",
    *LIBRARIES,
)  # fmt: skip


def installed_versions() -> dict[str, str]:
    """Versions of what can change a number; a package that is not installed is absent."""
    found = {}
    for package in sorted(PACKAGES):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found | {"python": platform.python_version()}


def device_name(provider: str) -> str:
    """The processor behind an ONNX Runtime provider."""
    return cpu_name() if provider == CPU else torch.cuda.get_device_name(0)


def cpu_name() -> str:
    """The CPU's name, what else tells it from others, and its usable cores."""
    return f"{processor_name()}, {usable_cores()} cores"


def environment_record(provider: str) -> dict[str, object]:
    """Everything above for `environment.json`."""
    return {
        "versions": installed_versions(),
        "platform": platform.platform(),
        "provider": provider,
        "device": device_name(provider),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    } | git_commit()


def git_commit() -> dict[str, str]:
    """The source's commit, marked when the tree was changed; empty where it is installed, not run from a clone."""
    folder = Path(__file__).resolve().parents[3]
    try:
        if Path(_git(folder, "rev-parse", "--show-toplevel")).resolve() != folder:
            return {}  # the repository that an environment with Quantrack happens to lie in
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": f"{commit}-dirty" if changed else commit}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
