import cv2
import numpy as np
import pytest

from quantrack.datasets.picture_size import encoded_size

LOSSLESS_WEBP = (cv2.IMWRITE_WEBP_QUALITY, 101)
PROGRESSIVE = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)


def encoded(extension: str, width: int, height: int, channels: int = 3, *options: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return bytes(cv2.imencode(extension, pixels, options)[1].tobytes())


@pytest.mark.parametrize(
    ("extension", "channels", "options"),
    [
        (".jpg", 3, ()), (".jpg", 1, ()), (".jpg", 3, PROGRESSIVE), (".png", 3, ()), (".png", 4, ()), (".bmp", 3, ()),
        (".webp", 3, ()), (".webp", 4, ()), (".webp", 3, LOSSLESS_WEBP),
    ],
)  # fmt: skip
def test_size_is_read_from_the_header(extension: str, channels: int, options: tuple[int, ...]) -> None:
    content = encoded(extension, 301, 47, channels, *options)
    assert encoded_size(content) == (301, 47)
    assert encoded_size(content[:12]) is None


def test_jpeg_with_a_thumbnail_and_padding_before_its_frame() -> None:
    thumbnail = encoded(".jpg", 16, 16)
    exif = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    content = encoded(".jpg", 120, 80)
    assert encoded_size(content[:2] + exif + b"\xff\xff" + content[2:]) == (120, 80)


def test_bmp_stored_top_down() -> None:
    content = encoded(".bmp", 20, 10)
    assert encoded_size(content[:22] + (-10).to_bytes(4, "little", signed=True) + content[26:]) == (20, 10)


def test_old_bmp_header() -> None:
    header = b"BM" + bytes(12) + (12).to_bytes(4, "little")
    assert encoded_size(header + (20).to_bytes(2, "little") + (10).to_bytes(2, "little")) == (20, 10)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF1234WEBPVP9 "])
def test_no_known_header(content: bytes) -> None:
    assert encoded_size(content) is None
