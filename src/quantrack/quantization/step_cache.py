"""Finished steps on disk, so that a rerun which changes a later step starts there.

A step's key is the digest of everything that its result depends on: the model, mode, bit plan,
pictures, input size, seed, the processor or GPU and its threads, the versions of the libraries,
Quantrack's own code, and the settings of the step and of all before it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from quantrack.cache import CACHE_VARIABLE, cache_folder
from quantrack.detector.device import hardware_name, has_bfloat16
from quantrack.errors import memory_problem
from quantrack.files import atomic_path, code_digests, combined_digest, write_json
from quantrack.progress import say
from quantrack.quantization.bit_plan import BitPlan
from quantrack.quantization.job import ActivationStatistics, QuantizationJob, StepReport
from quantrack.quantization.state import DAMAGED, model_of_state, model_state

FULL_DISK = "inline_container"  # in what PyTorch says where it cannot write on
WORTH_SECONDS = 3.0
LIMIT_BYTES = 4_000_000_000
WRITTEN_WITHIN = 86_400.0  # seconds; what a killed process left is older
ROOMS = ("datasets", "detector", "quantization")  # whose code decides what a step gives
T = TypeVar("T")
LIBRARIES = ("brevitas", "numpy", "opencv-python", "scipy", "torch", "ultralytics")  # and whose versions do


def step_keys(job: QuantizationJob, steps: Sequence[object]) -> list[str]:
    """The key of each step's result, in order; a step is known by its `repr`."""
    plan = "" if job.plan is None else repr(sorted(job.plan.bits.items()))
    key = combined_digest(
        [
            job.model_digest,
            job.head,
            repr(job.scheme),
            plan,
            job.calibration.digest,
            str(job.imgsz),
            str(job.batch),
            str(job.seed),
            job.device.type,
            hardware_name(job.device),
            str(has_bfloat16(job.device)),  # what distillation computes in
            str(torch.get_num_threads()),
            *(f"{name} {version(name)}" for name in LIBRARIES),
            *code_digests(ROOMS),
        ]
    )
    keys = []
    for step in steps:
        key = combined_digest([key, repr(step)])
        keys.append(key)
    return keys


def can_be_kept(job: QuantizationJob) -> bool:
    """Whether a key tells the job's results from those of other models: without a digest it cannot."""
    return bool(job.model_digest)


def save_step(key: str, job: QuantizationJob, reports: Sequence[StepReport]) -> None:
    """Keep the job's state after a step, and the reports so far; the oldest go where room runs out."""
    if not can_be_kept(job):
        return
    state = model_state(job.model) | {
        "statistics": {name: astuple(seen) for name, seen in job.statistics.items()},
        "reports": [(report.step, report.seconds, dict(report.figures)) for report in reports],
        "counted": sorted(job.cached_time.counted),
        "plan": None if job.plan is None else dict(job.plan.bits),
    }
    path = _path(key)
    with going_on_without(path.parent):
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
        forget_oldest(path.parent, keep=path)


@contextmanager
def going_on_without(folder: Path) -> Iterator[None]:
    """Where the cache cannot be written, say so and leave the block: all that it holds can be made again."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and FULL_DISK not in str(error):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or "is the disk full?"
        say(f"{folder}: cannot be written ({reason}); going on without; {CACHE_VARIABLE} names another cache")


def restore_step(key: str, job: QuantizationJob) -> list[StepReport] | None:
    """Put the job into the state after a step; None, and the job untouched, where it was not kept."""
    path = _path(key)
    if not can_be_kept(job) or not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=job.device, weights_only=True)
        model = model_of_state(state, job.float_model)
        statistics = {
            name: ActivationStatistics(*(values.cpu() for values in seen))  # where observing leaves them
            for name, seen in state["statistics"].items()
        }
        reports = [StepReport(*report) for report in state["reports"]]
        plan = None if state["plan"] is None else BitPlan(job.model_digest, state["plan"])
    except DAMAGED as error:
        if memory_problem(error):  # the file is whole
            raise
        say(f"cached step {path}: cannot be read ({type(error).__name__}); doing it again")
        with suppress(OSError):  # may be, it is only to be read
            path.unlink(missing_ok=True)
        return None
    job.model, job.statistics, job.plan = model, statistics, plan
    for key_of_part in state["counted"]:  # in the reports' seconds
        job.cached_time.count(key_of_part, 0.0)
    with suppress(OSError):  # forgotten by another process since, or only to be read; what was read stays
        os.utime(path)
    return reports


def cached(
    job: QuantizationJob,
    kind: str,
    key: str,
    measure: Callable[[], T],
    write: Callable[[T], object],
    read: Callable[[Any], T],
) -> T:
    """What `measure` gives, measured once for a key; what it took counts in the job either way.

    Of a model without a digest it is measured each time.

    `write` turns it into JSON, `read` back; `read` may raise `ValueError`, `KeyError` or `TypeError`.
    """
    if not can_be_kept(job):
        return measure()
    path = cache_path(f"{key}.json", kind)
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            value, seconds, parts = read(found["value"]), float(found["seconds"]), list(found["counted"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            say(f"cached {kind} {path}: cannot be read ({type(error).__name__}); measuring again")
        else:
            say(f"{kind}: {seconds:.1f} s (from the cache)")
            job.cached_time.count(key, seconds)
            for part in parts:  # in these seconds
                job.cached_time.count(part, 0.0)
            return value
    began, before, known = time.perf_counter(), job.cached_time.seconds, set(job.cached_time.counted)
    value = measure()
    seconds = time.perf_counter() - began + job.cached_time.seconds - before
    content = {"seconds": seconds, "counted": sorted(job.cached_time.counted - known), "value": write(value)}
    with going_on_without(path.parent):
        write_json(path, content)
    job.cached_time.count(key, 0.0)
    return value


def cache_path(key: str, kind: str) -> Path:
    """Where a result of a kind ("steps", "sensitivity", ...) is kept."""
    return cache_folder() / kind / key


def _path(key: str) -> Path:
    return cache_path(f"{key}.pt", "steps")


def forget_oldest(folder: Path, keep: Path) -> None:
    """Remove the files and folders of a kind that were used longest ago, where room runs out."""
    used = 0
    with suppress(FileNotFoundError):  # another process forgets as well
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            if path.name.startswith(".") and time.time() - path.stat().st_mtime < WRITTEN_WITHIN:
                continue  # another process is writing it
            used += sum(file.stat().st_size for file in (path.glob("*") if path.is_dir() else (path,)))
            if used <= LIMIT_BYTES or path == keep:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
