"""What a result was measured on: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from quantrack.quantization.step_cache import LIBRARIES
from quantrack.runtime.session import CPU, usable_cores

PACKAGES = (
    "quantrack", "mlflow", "onnx", "onnxoptimizer", "onnxruntime-gpu", "onnxslim", "pycocotools", "torchvision",
    *LIBRARIES,
)  # fmt: skip

VNNI = frozenset({"avx512_vnni", "avx_vnni"})


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
    info = Path("/proc/cpuinfo")
    known = processor_text(info.read_text()) if info.is_file() else ""
    return f"{known or platform.processor() or platform.machine()}, {usable_cores()} cores"


def processor_text(info: str) -> str:
    """The first processor of `/proc/cpuinfo`; empty where it has no name (ARM).

    Clouds call processors of several generations by one name, so family and model stand with it, and whether it
    has VNNI, which decides how fast integer kernels are.

    >>> processor_text("model name: AMD EPYC\\ncpu family: 25\\nmodel: 17\\nflags: sse avx512_vnni\\n")
    'AMD EPYC (family 25, model 17, VNNI)'
    """
    pairs = (line.partition(":")[::2] for line in info.partition("\n\n")[0].splitlines())
    said = {name.strip(): value.strip() for name, value in pairs}
    if "model name" not in said:
        return ""
    parts = [f"{what} {said[key]}" for key, what in (("cpu family", "family"), ("model", "model")) if key in said]
    parts += ["VNNI"] if VNNI.intersection(said.get("flags", "").split()) else []
    return said["model name"] + (f" ({', '.join(parts)})" if parts else "")


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
