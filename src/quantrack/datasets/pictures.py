"""Read a picture and letterbox it to the network's input, the same way everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from quantrack.datasets.picture_size import jpeg_is_whole
from quantrack.errors import QuantrackError

PAD_VALUE = 114  # Ultralytics' grey
JPEG_START, PNG_START, RIFF_START = b"\xff\xd8", b"\x89PNG", b"RIFF"
PNG_END = b"IEND\xaeB\x60\x82"  # the last chunk's name and checksum
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Letterbox:
    """How a picture was fitted: network pixel = picture pixel * scale + (left, top)."""

    scale: float
    left: int
    top: int
    width: int
    height: int


def content_problem(content: bytes) -> str | None:
    """Why the bytes of a picture file are no whole picture, without decoding them; None if they look whole."""
    if not content:
        return "empty"
    if content[:2] == JPEG_START and not jpeg_is_whole(content):
        return "truncated jpg (no end marker)"
    if content.startswith(PNG_START) and PNG_END not in content:
        return "truncated png (no end marker)"
    if content.startswith(RIFF_START) and int.from_bytes(content[4:8], "little") + 8 > len(content):
        return "truncated webp (shorter than it says)"
    return None


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder by their names' ends, in order; none where there is no folder.

    Hidden files are none: what a killed process left half written, and what macOS writes beside each file.

    Raises:
        QuantrackError: a name is no text, which nothing could log.
    """
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = sorted(path for path in found if path.suffix.lower() in PICTURE_SUFFIXES)
    for path in pictures:
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            raise QuantrackError(f"{folder}: the name of {path.name!a} is not UTF-8; rename the file") from error
    return pictures


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Decode a picture to BGR, shape [height, width, 3].

    Raises:
        QuantrackError: the file is missing, truncated or not a picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QuantrackError(f"{path}: cannot be read ({error.strerror}); fetch it again") from error
    if problem := content_problem(content):
        raise QuantrackError(f"{path}: {problem}; fetch it again")
    picture = decode_picture(content)
    if picture is None:
        raise QuantrackError(f"{path}: not a readable picture; fetch it again")
    return picture


def decode_picture(content: bytes) -> NDArray[np.uint8] | None:
    """Decode the bytes of a picture file to BGR, shape [height, width, 3]; None if they cannot be.

    Grey becomes colour, alpha is dropped, and the EXIF orientation is applied.
    """
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # for some broken files OpenCV answers None, for others it raises
        return None
    return None if picture is None else np.asarray(picture, dtype=np.uint8)


def letterbox(picture: NDArray[np.uint8], imgsz: int) -> tuple[NDArray[np.float32], Letterbox]:
    """Fit a BGR picture into a square RGB network input, keeping its aspect ratio.

    Returns:
        The input, shape [3, imgsz, imgsz], RGB in 0..1, and how it was fitted. The rounding follows
        Ultralytics' LetterBox, so that the numbers compare.
    """
    height, width = picture.shape[:2]
    scale = min(imgsz / height, imgsz / width)
    # of a picture longer than two input sides per pixel of its width, one column is left
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    if (new_width, new_height) != (width, height):
        picture = np.asarray(
            cv2.resize(picture, (new_width, new_height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8
        )
    left = round((imgsz - new_width) / 2 - 0.1)
    top = round((imgsz - new_height) / 2 - 0.1)
    canvas = np.full((imgsz, imgsz, 3), PAD_VALUE, dtype=np.uint8)
    canvas[top : top + new_height, left : left + new_width] = picture
    chw = canvas[:, :, ::-1].transpose(2, 0, 1)
    network_input = np.ascontiguousarray(chw, dtype=np.float32) / np.float32(255)
    return network_input, Letterbox(scale, left, top, width, height)


def network_input(path: Path, imgsz: int) -> NDArray[np.float32]:
    """A picture file as one network input, shape [3, imgsz, imgsz]."""
    return letterbox(read_picture(path), imgsz)[0]
