import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantrack.datasets.pictures import letterbox, pictures_in, read_picture
from quantrack.detector.ultralytics_setup import prepare
from quantrack.errors import QuantrackError


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (100, 33), (640, 427), (31, 31)])
def test_letterbox_equals_ultralytics(height: int, width: int) -> None:
    prepare()
    from ultralytics.data.augment import LetterBox

    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = LetterBox((64, 64), auto=False, scaleup=True)(image=picture)
    actual, fit = letterbox(picture, 64)
    np.testing.assert_array_equal(np.round(actual * 255).astype(np.uint8), expected[:, :, ::-1].transpose(2, 0, 1))
    assert actual.dtype == np.float32
    assert (fit.width, fit.height) == (width, height)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff\xe0 half of a jpg"])
def test_unreadable_pictures(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(QuantrackError, match=r"broken.jpg"):
        read_picture(path)


def test_truncated_jpg(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(QuantrackError, match=r"cut.jpg: truncated"):
        read_picture(path)


def test_a_video_may_follow_a_jpg(tmp_path: Path) -> None:
    path = tmp_path / "motion.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = read_picture(path)
    path.write_bytes(path.read_bytes() + bytes(20_000))
    np.testing.assert_array_equal(read_picture(path), whole)


def test_the_end_of_a_thumbnail_is_not_that_of_its_picture(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content, thumbnail = (cv2.imencode(".jpg", one)[1].tobytes() for one in (picture, picture[:16, :16]))
    exif = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    path.write_bytes(content[:2] + exif + content[2:1500])
    with pytest.raises(QuantrackError, match=r"cut.jpg: truncated"):
        read_picture(path)


def test_pictures_are_told_by_their_names(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "c.jpeg", "._c.jpeg", ".b.123.tmp.jpg"):
        (tmp_path / name).touch()
    assert [path.name for path in pictures_in(tmp_path)] == ["a.png", "b.JPG", "c.jpeg"]
    assert pictures_in(tmp_path / "nowhere") == []


def test_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match=r"gone.jpg: cannot be read"):
        read_picture(tmp_path / "gone.jpg")


def test_names_that_are_no_text_are_refused_in_one_line(tmp_path: Path) -> None:
    name = os.fsdecode(b"gr\xe4u.png")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(QuantrackError, match=r"the name of 'gr\\udce4u.png' is not UTF-8; rename the file"):
        pictures_in(tmp_path)
