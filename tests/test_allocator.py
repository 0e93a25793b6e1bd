"""Freed memory stays with the process, so that the next tensor of its size costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from quantrack import allocator

PROGRAM = """
import resource, sys
import torch
from torch import nn
from quantrack.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.set_num_threads(1)
convolutions = [nn.Conv2d(3 if place == 0 else 16, 16, 3, padding=1) for place in range(6)]
network = nn.Sequential(*(layer for one in convolutions for layer in (one, nn.SiLU())))
pictures = torch.rand(4, 3, 320, 320)

def faults_of_passes(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad():
        for _ in range(count):
            network(pictures)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_passes(4)  # until the heap has room for all
print(faults_of_passes(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library, whose memory is its own affair")
def test_a_pass_takes_the_memory_of_the_pass_before() -> None:
    """Twelve tensors of 26 MB a pass: a hundred thousand pages that the system had to fill, or fewer huge ones."""
    faults = {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for mode in ("as it is", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True, env=environment
        )
        faults[mode] = int(done.stdout)
    assert faults["kept"] < 0.2 * faults["as it is"]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("asked"))
    assert not allocator.keep_freed_memory()
