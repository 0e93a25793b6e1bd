"""Fixtures for all rooms.

Large libraries are imported where they are used: the process that hands out tests has no use for them, and the workers
wait for it.
"""

import contextlib
import gc
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from quantrack.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
QUICK_RUNS = "quick runs"
FILES_OF_QUICK_RUNS = (
    "test_compare.py", "test_entry_points.py", "test_promote.py", "test_refusals.py", "test_sensitivity.py",
    "test_serving.py",
)  # fmt: skip
LONGEST = (
    "tests/pipelines/test_real.py",
    QUICK_RUNS,
    "tests/onnx/test_exported_files.py",
    "tests/pipelines/test_qat.py",
    "tests/quantization/test_blocks.py",
    "tests/other_device/test_other_device.py",
    "tests/tracking/test_served_model.py",
    "tests/detector/test_training.py",
    "tests/tracking/test_registry.py",
    "tests/detector/test_checkpoint.py",
    "tests/quantization/test_two_processes.py",
)


def pytest_configure() -> None:
    """Each parallel worker and its child processes keep to a core: threads that wait for each other cost tenfold."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        import torch

        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)  # loaded by now, and so beyond the variable
    keep_freed_memory()  # as entry points do
    gc.set_threshold(10_000, 10, 10)  # a twentieth of the time went to looking through a million imported objects


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first, so that no worker is left with a long group at the end."""
    order = {group: place for place, group in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


class ByGroup(LoadScopeScheduling):
    """A worker takes a file at a time, or all tests of the quick runs, so that these are made once.

    xdist 3.8's own groups (`--dist loadgroup`) have no effect under pytest 9, which ignores the names that it writes.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)  # so that tests run without workers too
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByGroup:
    return ByGroup(config, log)


def group_of(nodeid: str) -> str:
    """A test's file, or the quick runs that it shares with other files."""
    file = nodeid.partition("::")[0]
    return QUICK_RUNS if Path(file).name in FILES_OF_QUICK_RUNS else file


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Finished steps are cached for the session, those of shared fixtures too, never in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTRACK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture
def real_inputs() -> Path:
    """Real COCO pictures and real weights; the test skips where they are absent."""
    folder = Path(os.environ.get("QUANTRACK_REAL_INPUTS", ROOT.parent / "shared"))
    if not (folder / "weights/yolov10n.pt").is_file():
        pytest.skip(f"no real inputs at {folder}; set QUANTRACK_REAL_INPUTS")
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a store without runs, made once: its tables take MLflow two seconds."""
    import mlflow

    folder = tmp_path_factory.mktemp("empty_store")
    with contextlib.chdir(folder):  # where artifacts go
        mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh MLflow store in a folder of its own, which is also the working directory."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path)
    moved = "update experiments set artifact_location = replace(artifact_location, ?, ?)"
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as tables, tables:
        tables.execute(moved, (str(empty_store.parent), str(tmp_path)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path
    while mlflow.active_run():
        mlflow.end_run()


def write_picture(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> None:
    import cv2
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels)


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """Four annotated val pictures and four train pictures in the official layout, two classes."""
    root = tmp_path / "coco"
    images, annotations = [], []
    for image_id in (30, 10, 20, 40):  # not in order, as in the official file
        write_picture(root / f"val2017/{image_id:012d}.jpg", seed=image_id)
        write_picture(root / f"train2017/{image_id:012d}.jpg", seed=image_id + 1)
        images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": 64, "height": 48})
        box = {"bbox": [8, 8, 20, 16], "area": 320, "iscrowd": 0}
        annotations.append({"id": image_id, "image_id": image_id, "category_id": 7, **box})
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir()
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return root
