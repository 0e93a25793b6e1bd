"""Run a pipeline's file as a command, in this process: importing torch once is enough."""

import os
import runpy
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import mlflow
from mlflow.entities import Run

ROOT = Path(__file__).resolve().parents[2]
# most of YOLOv10's kinds of blocks and its head, trained for the demo's pictures: a third of the demo's time
SMALL = str(ROOT / "tests/small/small.pt")
SMALL_LAYERS = 34  # convolutions, without DFL's
QUICK = (
    "--model", SMALL, "--data-root", "demo", "--imgsz", "320", "--eval-images", "12", "--calib-images", "6",
    "--latency-runs", "5",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    returncode: int
    stderr: str


def use_store(folder: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")


def newest_run(folder: Path, entry_point: str) -> Run:
    """The last run of an entry point in the store of `folder`."""
    use_store(folder)
    run = mlflow.search_runs(
        filter_string=f"tags.entry_point = '{entry_point}'",
        output_format="list",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )[0]
    assert isinstance(run, Run)
    return run


def run_pipeline(folder: Path, name: str, *options: str) -> Done:
    """Exit code and standard error of `python pipelines/NAME.py OPTIONS` with its store in `folder`."""
    use_store(folder)
    code, stderr, before = 0, StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with (
            patch.object(sys, "argv", [name, *options]),
            patch.object(sys, "stderr", stderr),
            patch.object(sys, "path", [str(ROOT / "pipelines"), *sys.path]),  # as Python does for a script
        ):
            runpy.run_path(str(ROOT / f"pipelines/{name}.py"), run_name="__main__")
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.chdir(before)
    return Done(code, stderr.getvalue())
