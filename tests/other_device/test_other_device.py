"""Every step of quantization on a device that is not the CPU, so that what CUDA would refuse is seen without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def device_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device, compiled against the installed PyTorch."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the device with")
    import torch

    root, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("device") / "other_device.so"
    folders = (root / "include", root / "include/torch/csrc/api/include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, "-std=c++17", "-O0", "-fPIC", "-shared", abi, *(f"-I{folder}" for folder in folders)]
    command += [
        str(HERE / "other_device.cpp"),
        "-o",
        str(library),
        f"-L{root / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


def test_all_steps_keep_to_their_device(device_library: Path) -> None:
    command = [sys.executable, str(HERE / "quantize_there.py"), str(device_library)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "helpers")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
