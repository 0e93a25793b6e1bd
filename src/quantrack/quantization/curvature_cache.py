"""The curvatures of the float network, kept on disk for all modes and bit plans."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from quantrack.errors import memory_problem
from quantrack.files import atomic_folder, write_json
from quantrack.progress import say
from quantrack.quantization.curvature import Curvature, Curvatures, Sampling, curvatures_of
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import quantized_layers
from quantrack.quantization.state import DAMAGED
from quantrack.quantization.step_cache import cache_path, can_be_kept, forget_oldest, going_on_without, step_keys
from quantrack.schemes import Scheme

ANY_MODE = Scheme("any mode", 8, None)
KEPT = "kept.json"  # beside the files of a kept walk: how many they are, and the seconds that it took


def float_curvatures(job: QuantizationJob, sampling: Sampling) -> Curvatures:
    """Curvatures by layer name, a few layers at a time in network order, of the inputs in the float network.

    It is walked once for the same model, pictures, settings and code: neither the job's weights nor its activations
    enter them, so all modes and bit plans share what is kept. Of a model without a digest nothing is.
    """
    found = curvatures_of(job, job.float_model, sampling)
    if not can_be_kept(job):
        return found
    layers = sorted(quantized_layers(job.model))
    (key,) = step_keys(replace(job, scheme=ANY_MODE, plan=None), [(sampling, layers)])
    folder = cache_path(key, "curvatures")
    if folder.is_dir():
        try:
            kept, seconds = _read(folder, layers)
        except DAMAGED as error:
            if memory_problem(error):  # the files are whole
                raise
            say(f"cached curvatures {folder}: cannot be read ({type(error).__name__}); measuring again")
        else:
            say(f"GPTQ: curvatures of {len(layers)} layers (from the cache)")
            with suppress(OSError):  # forgotten by another process since, or only to be read; what was read stays
                os.utime(folder)
            job.cached_time.count(key, seconds)
            return ({name: one.to(job.device) for name, one in of.items()} for of in kept)
    job.cached_time.count(key, 0.0)
    return _kept(found, folder)


def _kept(found: Curvatures, folder: Path) -> Curvatures:
    """What is found, and a copy of it on disk once all of it was asked for."""
    with ExitStack() as stack:
        target: Path | None = None
        with going_on_without(folder.parent):
            target = stack.enter_context(atomic_folder(folder))
        seconds, count, began = 0.0, 0, time.perf_counter()
        for count, by_name in enumerate(found, 1):
            seconds += time.perf_counter() - began  # and not what is done with it
            parts = {name: vars(curvature) for name, curvature in by_name.items()}
            if target is not None:
                target = _written(target, partial(torch.save, parts, target / f"{count}.pt"))
            yield by_name
            began = time.perf_counter()
        if target is not None:
            target = _written(target, partial(write_json, target / KEPT, {"files": count, "seconds": seconds}))
    if target is not None:
        with going_on_without(folder.parent):
            forget_oldest(folder.parent, keep=folder)


def _written(folder: Path, write: Callable[[], object]) -> Path | None:
    """The folder with one file more; None, and no folder, where it cannot be written."""
    with going_on_without(folder.parent):
        write()
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _read(folder: Path, layers: list[str]) -> tuple[list[dict[str, Curvature]], float]:
    """All of a kept walk, which lies in the files until it is used, and the seconds that it took.

    Raises:
        ValueError: it is not of these layers.
    """
    kept = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    files = [
        torch.load(folder / f"{place}.pt", map_location="cpu", weights_only=True, mmap=True)
        for place in range(1, kept["files"] + 1)
    ]
    if sorted(name for file in files for name in file) != layers:
        raise ValueError(f"{folder}: other layers")
    return [{name: Curvature(**parts) for name, parts in file.items()} for file in files], float(kept["seconds"])
