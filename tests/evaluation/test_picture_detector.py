"""Every form of a picture becomes the same pixels; everything else is refused in one line."""

import base64
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantrack.datasets.pictures import read_picture
from quantrack.errors import QuantrackError, UsageError
from quantrack.evaluation.picture_detector import base64_picture, detection_settings, to_picture


def png(width: int, height: int) -> bytes:
    """A file whose header names a size; it has no pixels to speak of."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "street.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return path


def test_all_forms_are_the_same_pixels(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_picture(picture)
    content = picture.read_bytes()
    text = base64.b64encode(content).decode()
    wrapped = base64.encodebytes(content).decode()
    monkeypatch.chdir(picture.parent)
    forms = [picture, str(picture), "street.jpg", content, bytearray(content), text, wrapped]
    for form in [*forms, f"data:image/jpeg;base64,{text}", expected[:, :, ::-1]]:
        np.testing.assert_array_equal(to_picture(form), expected)
    for form in (text, wrapped, f"data:image/jpeg;base64,{text}"):
        np.testing.assert_array_equal(base64_picture(form), expected)


def test_grey_alpha_and_orientation_as_in_the_evaluation(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 4), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "alpha.png"), pixels)
    cv2.imwrite(str(tmp_path / "grey.png"), pixels[:, :, 0])
    plain = cv2.imencode(".jpg", pixels[:, :, :3])[1].tobytes()
    rotate = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x112, 3, 1, 6, 0, 0)  # orientation 6: turn right
    exif = b"\xff\xe1" + struct.pack(">H", len(rotate) + 8) + b"Exif\0\0" + rotate
    (tmp_path / "turned.jpg").write_bytes(plain[:2] + exif + plain[2:])
    for name, shape in (("alpha.png", (30, 50, 3)), ("grey.png", (30, 50, 3)), ("turned.jpg", (50, 30, 3))):
        found = to_picture((tmp_path / name).read_bytes())
        assert found.shape == shape
        np.testing.assert_array_equal(found, read_picture(tmp_path / name))


BROKEN = {
    b"": "empty",
    b"<html>": "not a JPEG, PNG, WebP or BMP",
    b"\xff\xd8\xff\xe0 half of a jpg": "truncated",
    b"\x89PNG\r\n\x1a\n" + bytes(40): "truncated png",
    b"\x89PNG\r\n\x1a\n" + bytes(40) + b"IEND\xaeB\x60\x82": "damaged",
    png(60_000, 60_000): "60000 x 60000 pixels are too many",
    png(32, 32): "damaged",
}


@pytest.mark.parametrize("content", BROKEN)
def test_broken_pictures(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for read, source in (
        (to_picture, content),
        (to_picture, path),
        (base64_picture, base64.b64encode(content).decode()),
    ):
        with pytest.raises(QuantrackError, match=BROKEN[content]) as refused:
            read(source)  # type: ignore[operator]
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((4, 4), np.uint8), "shape \\[4, 4\\]"),
        (np.zeros((4, 4, 4), np.uint8), "shape \\[4, 4, 4\\]"),
        (np.zeros((0, 4, 3), np.uint8), "shape \\[0, 4, 3\\]"),
        (np.zeros((4, 4, 3), np.float32), "array of float32"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "too many"),
        ("nowhere.jpg", "no such file"),
        ("nul\0.jpg", "no"),
        ("x" * 5000, "cannot be read"),
        (".", "a folder"),
        (None, "NoneType is no picture"),
        (3.5, "float is no picture"),
    ],
)
def test_what_is_no_picture(source: object, reason: str) -> None:
    with pytest.raises(QuantrackError, match=reason) as refused:
        to_picture(source)
    assert len(str(refused.value)) < 250
    assert "\n" not in str(refused.value)


def test_a_stranger_names_no_files(picture: Path) -> None:
    for source in (str(picture), f"file://{picture}", "https://example.com/street.jpg", "/etc/passwd"):
        with pytest.raises(QuantrackError, match="send the picture file's bytes as base64"):
            base64_picture(source)
    for source in (picture, picture.read_bytes(), read_picture(picture), None):
        with pytest.raises(QuantrackError, match="is no picture; send"):
            base64_picture(source)


@pytest.mark.parametrize("values", [(-0.1, 300), (1.1, 300), (float("nan"), 300), (0.5, 0)])
def test_refused_settings(values: tuple[float, int]) -> None:
    with pytest.raises(UsageError, match="must be"):
        detection_settings(*values)
