"""A COCO set as Ultralytics reads one, in a folder of its own: labels converted, pictures linked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import yaml

from quantrack.datasets.coco import EvaluationSet
from quantrack.datasets.training import TrainingPictures, write_instances
from quantrack.detector.ultralytics_setup import prepare


def write_yolo_data(pictures: TrainingPictures, folder: Path) -> Path:
    """Write `images/` (links), `labels/` and `data.yaml` to the folder; the data set itself is not touched.

    Returns:
        The path of `data.yaml`.
    """
    parts = {"train": pictures.training, "val": pictures.held_back}
    _convert_labels(parts, folder)
    for name, part in parts.items():
        _link_pictures(part, folder / "images" / name)
    names = {index: category.name for index, category in enumerate(pictures.training.categories)}
    description = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": names}
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    return path


def _convert_labels(parts: Mapping[str, EvaluationSet], folder: Path) -> None:
    """Ultralytics' converter reads a folder of annotation files and writes to one that is not there yet."""
    prepare()
    from ultralytics.data.converter import convert_coco

    with tempfile.TemporaryDirectory(dir=_made(folder)) as temporary:
        annotations, converted = _made(Path(temporary) / "annotations"), Path(temporary) / "converted"
        for name, part in parts.items():
            write_instances(part, annotations / f"instances_{name}.json")
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            convert_coco(str(annotations), str(converted), cls91to80=False)
        shutil.rmtree(folder / "labels", ignore_errors=True)
        (converted / "labels").rename(folder / "labels")
    for name in parts:
        _made(folder / "labels" / name)  # the converter makes none for a part without boxes


def _link_pictures(part: EvaluationSet, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _made(folder)
    for picture in part.pictures:
        (folder / f"{picture.id:012d}{picture.path.suffix}").symlink_to(picture.path.resolve())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
