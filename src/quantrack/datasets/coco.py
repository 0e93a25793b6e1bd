"""The evaluation subset: the first N pictures of val2017 in sorted id order, digested."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quantrack.datasets.picture_size import encoded_size, may_be_turned
from quantrack.datasets.pictures import content_problem, decode_picture
from quantrack.errors import QuantrackError, UsageError
from quantrack.files import combined_digest, file_digest

MEND = "mend the file or fetch it again"
VAL_ANNOTATIONS = Path("annotations/instances_val2017.json")
TRAIN_ANNOTATIONS = Path("annotations/instances_train2017.json")


@dataclass(frozen=True)
class Picture:
    """One annotated picture; width and height are what the annotation file says."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Category:
    """One class; `id` is the annotation file's own (COCO's run from 1 to 90 with gaps)."""

    id: int
    name: str


@dataclass(frozen=True)
class TrueBox:
    """One ground-truth box as (x, y, width, height) in the picture's pixels.

    `area` is the annotated object's (its mask's in COCO): the size ranges small, medium and large
    go by it.
    """

    image_id: int
    category_id: int
    xywh: tuple[float, float, float, float]
    crowd: bool
    area: float


@dataclass(frozen=True)
class EvaluationSet:
    """A fixed set of pictures of one split with ground truth.

    `digest` covers the ids, every picture's bytes and the annotation file: two runs are comparable
    only when it is equal. `categories` are in sorted id order: index i is the detector's class i.
    """

    root: Path
    annotation_file: Path
    pictures: tuple[Picture, ...]
    categories: tuple[Category, ...]
    boxes: tuple[TrueBox, ...]
    digest: str
    split: str = "val"

    @property
    def name(self) -> str:
        return f"{self.split}{len(self.pictures)}"


def require_same_categories(one: EvaluationSet, other: EvaluationSet) -> None:
    """Check that two annotation files name the same classes in the same order, by which detectors know them.

    Raises:
        QuantrackError: they do not.
    """
    here, there = ([category.name for category in each.categories] for each in (one, other))
    if here != there:
        pairs = enumerate(zip_longest(here, there, fillvalue="missing"))
        place, (name, expected) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        raise QuantrackError(
            f"{one.annotation_file}: its category number {place} by id is {name}, but {expected} in "
            f"{other.annotation_file}; give both the same categories"
        )


def load_evaluation_set(data_root: Path, eval_images: int) -> EvaluationSet:
    """Read the first `eval_images` pictures (0 = all) of `data_root`'s val2017 split.

    Raises:
        QuantrackError: the data root, annotation file or a picture is missing or unreadable, or no box is in any.
        UsageError: more pictures were asked for than the annotation file lists.
    """
    annotation_file = data_root / VAL_ANNOTATIONS
    content = read_annotations(data_root, annotation_file)
    chosen = first_entries(content, eval_images, annotation_file)
    pictures = tuple(picture_of(entry, data_root / "val2017", annotation_file) for entry in chosen)
    found = annotated_set(data_root, annotation_file, content, pictures, "val")
    if all(box.crowd for box in found.boxes):
        raise QuantrackError(
            f"eval_images={eval_images}: {annotation_file} has no box in these {len(pictures)} pictures, so "
            "there is no accuracy to measure; ask for more of them, or 0 for all"
        )
    return found


def first_entries(content: dict[str, Any], eval_images: int, annotation_file: Path) -> list[dict[str, Any]]:
    """The first entries of pictures by id (0 = all) of a parsed annotation file.

    Raises:
        UsageError: there are fewer.
    """
    entries = sorted(content["images"], key=lambda entry: int(entry["id"]))
    if eval_images > len(entries):
        raise UsageError(
            f"eval_images={eval_images}: {annotation_file} lists only {len(entries)} pictures; "
            f"ask for at most {len(entries)}, or 0 for all"
        )
    return entries[: eval_images or len(entries)]


def annotated_set(
    data_root: Path, annotation_file: Path, content: dict[str, Any], pictures: tuple[Picture, ...], split: str
) -> EvaluationSet:
    """Some pictures of a parsed annotation file, with their boxes.

    Raises:
        QuantrackError: an entry is broken, or a picture has another size than its entry says.
    """
    kept = {picture.id for picture in pictures}
    rows = sorted(content["categories"], key=lambda row: int(row["id"]))
    categories = tuple(Category(int(row["id"]), str(row["name"])) for row in rows)
    parts = [file_digest(annotation_file)]
    parts += [f"{picture.id} {_digest_of_annotated(picture, annotation_file)}" for picture in pictures]
    return EvaluationSet(
        root=data_root,
        annotation_file=annotation_file,
        pictures=pictures,
        categories=categories,
        boxes=tuple(_true_boxes(content["annotations"], kept, {one.id for one in categories}, annotation_file)),
        digest=combined_digest(parts),
        split=split,
    )


def _digest_of_annotated(picture: Picture, annotation_file: Path) -> str:
    """Also refuses, before any work begins, what its bytes show to be no whole picture, or one of another size."""
    content = picture.path.read_bytes()
    size, annotated = encoded_size(content), (picture.width, picture.height)
    if problem := content_problem(content):
        raise QuantrackError(f"{picture.path}: {problem}; fetch it again")
    if size is None or (sorted(size) == sorted(annotated) and (size != annotated or may_be_turned(content))):
        size = _decoded_size(picture.path, content)
    require_annotated_size(picture, size, annotation_file)
    return hashlib.sha256(content).hexdigest()


def _decoded_size(path: Path, content: bytes) -> tuple[int, int]:
    decoded = decode_picture(content)
    if decoded is None:
        raise QuantrackError(f"{path}: not a readable picture; fetch it again")
    height, width = decoded.shape[:2]
    return width, height


def require_annotated_size(picture: Picture, size: tuple[int, int], annotation_file: Path) -> None:
    """Check that a picture has the width and height in which its boxes are given.

    Raises:
        QuantrackError: it has not.
    """
    if size != (picture.width, picture.height):
        raise QuantrackError(
            f"{picture.path}: has {size[0]} x {size[1]} pixels, but {annotation_file} says {picture.width} x "
            f"{picture.height}, in which its boxes are; put the annotated picture there"
        )


def read_annotations(data_root: Path, annotation_file: Path) -> dict[str, Any]:
    """Parse a COCO instances file and check that it has pictures, boxes and categories.

    Raises:
        QuantrackError: the folder or file is missing, is not JSON or lacks a section.
    """
    if not data_root.is_dir():
        raise QuantrackError(
            f"data_root={data_root}: no such folder; prepare it with the `data` entry point, "
            "or try the embedded demo: -P model=demo -P data_root=demo"
        )
    if not annotation_file.is_file():
        raise QuantrackError(f"{annotation_file}: missing; data_root must have the official COCO layout")
    try:
        content = json.loads(annotation_file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise QuantrackError(f"{annotation_file}: not valid JSON ({error}); {MEND}") from error
    missing = [key for key in ("images", "annotations", "categories") if not _is_list(content, key)]
    if missing:
        raise QuantrackError(f"{annotation_file}: no {', '.join(missing)} list; use a COCO instances file")
    if not content["images"]:
        raise QuantrackError(f"{annotation_file}: lists no pictures; use a COCO instances file")
    for key in ("images", "categories"):
        _require_ids(content[key], key, annotation_file)
    return dict(content)


def _require_ids(rows: list[object], key: str, annotation_file: Path) -> None:
    """Check that every entry has a whole number as `id`, no two the same, and every category a name."""
    seen: set[int] = set()
    for row in rows:
        known = row if isinstance(row, dict) else {}
        try:
            number = int(known["id"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise QuantrackError(f"{annotation_file}: an entry of {key} has no id; {MEND}") from error
        if key == "categories" and "name" not in known:
            raise QuantrackError(f"{annotation_file}: category {number} has no name; {MEND}")
        if number in seen:
            raise QuantrackError(f"{annotation_file}: two {key} have id {number}; {MEND}")
        seen.add(number)


def _is_list(content: object, key: str) -> bool:
    return isinstance(content, dict) and isinstance(content.get(key), list)


def picture_of(entry: dict[str, Any], folder: Path, annotation_file: Path) -> Picture:
    """The picture of one entry of an annotation file.

    Raises:
        QuantrackError: the entry is incomplete, or the picture is missing.
    """
    try:
        picture = Picture(int(entry["id"]), folder / str(entry["file_name"]), int(entry["width"]), int(entry["height"]))
    except KeyError as error:
        raise QuantrackError(f"{annotation_file}: a picture entry lacks {error}; {MEND}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise QuantrackError(f"{annotation_file}: a picture entry is broken ({error}); {MEND}") from error
    if not picture.path.is_file():
        raise QuantrackError(
            f"{picture.path}: missing, though {annotation_file.name} lists it; run the `data` entry point"
        )
    return picture


def _true_boxes(
    rows: list[dict[str, Any]], kept: set[int], category_ids: set[int], annotation_file: Path
) -> Iterator[TrueBox]:
    for row in rows:
        try:
            if int(row["image_id"]) not in kept:
                continue
            x, y, width, height = (float(value) for value in row["bbox"])
            if not all(math.isfinite(value) for value in (x, y, width, height)) or min(width, height) < 0:
                raise ValueError(f"{row['bbox']} is no box")
            if int(row["category_id"]) not in category_ids:
                raise ValueError(f"no category {row['category_id']} is listed")
            area = float(row.get("area", width * height))
            if not (math.isfinite(area) and area >= 0):  # pycocotools would leave such boxes out in silence
                raise ValueError(f"{area} is no area")
            yield TrueBox(
                image_id=int(row["image_id"]),
                category_id=int(row["category_id"]),
                xywh=(x, y, width, height),
                crowd=bool(row.get("iscrowd", 0)),
                area=area,
            )
        except KeyError as error:
            raise QuantrackError(f"{annotation_file}: an annotation entry lacks {error}; {MEND}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise QuantrackError(f"{annotation_file}: an annotation entry is broken ({error}); {MEND}") from error
