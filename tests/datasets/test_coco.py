import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantrack.datasets.coco import load_evaluation_set
from quantrack.errors import QuantrackError, UsageError


def test_subset_is_the_first_ids_in_sorted_order(coco_root: Path) -> None:
    chosen = load_evaluation_set(coco_root, 2)
    assert [picture.id for picture in chosen.pictures] == [10, 20]
    assert [category.name for category in chosen.categories] == ["dog", "cat"]
    assert {box.image_id for box in chosen.boxes} == {10, 20}
    assert len(load_evaluation_set(coco_root, 0).pictures) == 4


def test_digest_covers_pictures_ids_and_annotations(coco_root: Path) -> None:
    digest = load_evaluation_set(coco_root, 2).digest
    assert load_evaluation_set(coco_root, 2).digest == digest
    assert load_evaluation_set(coco_root, 3).digest != digest
    (coco_root / "val2017/000000000010.jpg").write_bytes((coco_root / "val2017/000000000030.jpg").read_bytes())
    assert load_evaluation_set(coco_root, 2).digest != digest


def test_more_pictures_than_there_are(coco_root: Path) -> None:
    with pytest.raises(UsageError, match=r"eval_images=5: .* lists only 4 pictures"):
        load_evaluation_set(coco_root, 5)


def test_missing_data_root_names_the_demo(tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match=r"no such folder.*model=demo"):
        load_evaluation_set(tmp_path / "nowhere", 1)


def test_missing_picture(coco_root: Path) -> None:
    (coco_root / "val2017/000000000010.jpg").unlink()
    with pytest.raises(QuantrackError, match=r"000000000010.jpg: missing"):
        load_evaluation_set(coco_root, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no images, annotations, categories list"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no pictures"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "lacks 'file_name'"),
        ('{"images": [{}], "annotations": [], "categories": []}', "an entry of images has no id"),
        ('{"images": [7], "annotations": [], "categories": []}', "an entry of images has no id"),
        ('{"images": [{"id": "abc"}], "annotations": [], "categories": []}', "an entry of images has no id"),
        ('{"images": [{"id": 1}, {"id": 1}], "annotations": [], "categories": []}', "two images have id 1"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"name": "cat"}]}', "categories has no id"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 3}]}', "category 3 has no name"),
    ],
)
def test_broken_annotations(coco_root: Path, text: str, message: str) -> None:
    (coco_root / "annotations/instances_val2017.json").write_text(text)
    with pytest.raises(QuantrackError, match=message):
        load_evaluation_set(coco_root, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>login</html>", "not a readable picture"),
        (b"", "empty"),
        ("half", r"truncated jpg \(no end marker\)"),
        ("turned", "has 48 x 64 pixels, but .* says 64 x 48"),
        ("turned by EXIF", "has 48 x 64 pixels, but .* says 64 x 48"),
        ("half png", r"truncated png \(no end marker\)"),
        ("half webp", r"truncated webp \(shorter than it says\)"),
    ],
)
def test_what_is_no_annotated_picture_is_refused_at_once(coco_root: Path, content: bytes | str, said: str) -> None:
    picture = coco_root / "val2017/000000000020.jpg"
    whole = picture.read_bytes()
    if content == "half":
        content = whole[: len(whole) // 2]
    elif content == "turned":
        content = cv2.imencode(".png", np.zeros((64, 48, 3), np.uint8))[1].tobytes()
    elif content == "turned by EXIF":
        entry = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"  # orientation: a short, one, 6
        tiff = b"MM\x00*\x00\x00\x00\x08\x00\x01" + entry + b"\x00\x00\x00\x00"
        content = whole[:2] + b"\xff\xe1" + (len(tiff) + 8).to_bytes(2, "big") + b"Exif\0\0" + tiff + whole[2:]
    elif content in ("half png", "half webp"):
        content = cv2.imencode(f".{content[5:]}", np.eye(48, 64, dtype=np.uint8) * 200)[1].tobytes()
        content = content[: len(content) // 2]
    assert isinstance(content, bytes)
    picture.write_bytes(content)
    with pytest.raises(QuantrackError, match=f"000000000020.jpg: {said}"):
        load_evaluation_set(coco_root, 0)


def test_an_annotation_file_may_begin_with_a_mark_of_its_encoding(coco_root: Path) -> None:
    path = coco_root / "annotations/instances_val2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_evaluation_set(coco_root, 0).pictures) == 4


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": [{"id": ' + "9" * 5000 + "}]}", "{"])
def test_what_is_no_json_is_one_line(coco_root: Path, text: str) -> None:
    (coco_root / "annotations/instances_val2017.json").write_text(text)
    with pytest.raises(QuantrackError, match=r"not valid JSON .*; mend the file or fetch it again"):
        load_evaluation_set(coco_root, 0)


@pytest.mark.parametrize("crowd", [False, True])
def test_pictures_without_a_box_to_find(coco_root: Path, crowd: bool) -> None:
    path = coco_root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    own = [box for box in content["annotations"] if box["image_id"] == 10]
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] != 10]
    content["annotations"] += [box | {"iscrowd": 1} for box in own if crowd]
    path.write_text(json.dumps(content))
    with pytest.raises(QuantrackError, match=r"eval_images=1: .* has no box in these 1 pictures, .* ask for more"):
        load_evaluation_set(coco_root, 1)
    assert len(load_evaluation_set(coco_root, 2).pictures) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bbox": [float("nan"), 0, 1, 1]}, "is no box"),
        ({"bbox": [0, 0, -1, 1]}, "is no box"),
        ({"category_id": 77}, "no category 77 is listed"),
        ({"area": -1}, "-1.0 is no area"),
        ({"area": float("nan")}, "nan is no area"),
    ],
)
def test_boxes_that_are_none(coco_root: Path, change: dict[str, object], said: str) -> None:
    path = coco_root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][1] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(QuantrackError, match=rf"an annotation entry is broken \(.*{said}\); mend the file or"):
        load_evaluation_set(coco_root, 0)


def test_annotation_without_box(coco_root: Path) -> None:
    path = coco_root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["bbox"]
    path.write_text(json.dumps(content))
    with pytest.raises(QuantrackError, match=r"annotation .* lacks"):
        load_evaluation_set(coco_root, 0)
