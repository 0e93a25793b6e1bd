"""Labelled pictures to train on, and others of the same split held back to judge the training by."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantrack.datasets.coco import (
    TRAIN_ANNOTATIONS,
    EvaluationSet,
    Picture,
    annotated_set,
    picture_of,
    read_annotations,
)
from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import say

HELD_BACK_SHARE = 0.15
MOST_HELD_BACK = 500
LEAST_PICTURES = 8


@dataclass(frozen=True)
class TrainingPictures:
    """Two sets of train2017 without a picture in common."""

    training: EvaluationSet
    held_back: EvaluationSet


def load_training_pictures(
    data_root: Path, train_images: int, seed: int, not_held_back: Collection[Path]
) -> TrainingPictures:
    """Draw `train_images` pictures (0 = all) of `data_root`'s train2017 split, a part of them held back.

    Pictures that the annotation file lists but that are not here are left out, as `data` fetches only
    some. `not_held_back` are the calibration pictures: a start that was calibrated on them would look
    better on them than it is; where there are not enough others, some of them are held back even so.

    Raises:
        QuantrackError: the annotation file is missing or broken, there are fewer than 8 pictures, or no box is in
            those held back.
        UsageError: more pictures were asked for than there are.
    """
    annotation_file = data_root / TRAIN_ANNOTATIONS
    content = read_annotations(data_root, annotation_file)
    entries = sorted(content["images"], key=lambda entry: int(entry["id"]))
    folder = data_root / "train2017"
    here = [entry for entry in entries if (folder / str(entry.get("file_name", ""))).is_file()]
    _require_enough(train_images, len(here), len(entries), folder)
    drawn = random.Random(seed).sample(here, train_images or len(here))
    pictures = sorted((picture_of(entry, folder, annotation_file) for entry in drawn), key=lambda picture: picture.id)
    held = _hold_back(pictures, {path.resolve() for path in not_held_back}, seed)
    rest = tuple(picture for picture in pictures if picture.id not in held)
    held_back = annotated_set(
        data_root, annotation_file, content, tuple(p for p in pictures if p.id in held), "held-back"
    )
    if all(box.crowd for box in held_back.boxes):
        raise QuantrackError(
            f"{annotation_file}: no box in the {len(held)} pictures held back to choose the best epoch by; give more "
            "train_images, or another seed"
        )
    return TrainingPictures(annotated_set(data_root, annotation_file, content, rest, "train"), held_back)


def _require_enough(train_images: int, here: int, listed: int, folder: Path) -> None:
    if here < LEAST_PICTURES:
        raise QuantrackError(
            f"{folder}: {here} of the {listed} pictures of {TRAIN_ANNOTATIONS.name} are here; training needs at least "
            f"{LEAST_PICTURES}: fetch them with the `data` entry point, -P images=all"
        )
    if train_images > here:
        raise UsageError(
            f"train_images={train_images}: {folder} has {here} pictures; ask for at most {here}, 0 for all"
        )
    if here < listed:
        say(f"{folder}: {here} of {listed} listed pictures are here")


def _hold_back(pictures: list[Picture], avoided: set[Path], seed: int) -> set[int]:
    """The ids of the pictures held back, those not to be avoided first."""
    count = max(1, min(MOST_HELD_BACK, round(HELD_BACK_SHARE * len(pictures))))
    order = random.Random(seed + 1).sample(pictures, len(pictures))
    order.sort(key=lambda picture: picture.path.resolve() in avoided)
    return {picture.id for picture in order[:count]}


def clipped_box(xywh: Sequence[float], width: int, height: int) -> list[float]:
    """What of a box lies in the picture.

    >>> clipped_box((-2.0, 5.0, 12.0, 100.0), 20, 30)
    [0.0, 5.0, 10.0, 25.0]
    """
    x, y, w, h = xywh
    left, top = max(0.0, x), max(0.0, y)
    return [left, top, max(0.0, min(x + w, width) - left), max(0.0, min(y + h, height) - top)]


def write_instances(pictures: EvaluationSet, path: Path) -> None:
    """Write the set as a COCO instances file whose category ids are the detector's class indices plus 1.

    Boxes are cut at the picture's edges: a box much wider than its picture makes Ultralytics leave out the picture.
    """
    class_of = {category.id: index for index, category in enumerate(pictures.categories, 1)}
    sides = {picture.id: (picture.width, picture.height) for picture in pictures.pictures}
    content = {
        "images": [
            {"id": p.id, "file_name": f"{p.id:012d}{p.path.suffix}", "width": p.width, "height": p.height}
            for p in pictures.pictures
        ],
        "annotations": [
            {
                "id": number,
                "image_id": box.image_id,
                "category_id": class_of[box.category_id],
                "bbox": clipped_box(box.xywh, *sides[box.image_id]),
                "area": box.area,
                "iscrowd": int(box.crowd),
            }
            for number, box in enumerate(pictures.boxes, 1)
        ],
        "categories": [{"id": class_of[category.id], "name": category.name} for category in pictures.categories],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
