"""What a picture's bytes say without being decoded: its size, so that an absurdly large one is refused; its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

KNOWN_FORMATS = "JPEG, PNG, WebP or BMP"
_JPEG, _PNG, _BMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"
_RIFF, _WEBP = b"RIFF", b"WEBP"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those three are tables, not frames
_NEAR_THE_END = 4096
_HEAD, _EXIF = 1 << 17, (b"Exif\0\0", b"eXIf", b"EXIF")  # JPEG's, PNG's and WebP's name for it
_JPEG_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers that no length follows


def looks_like_picture(content: bytes) -> bool:
    """Whether the first bytes are those of a known format.

    >>> looks_like_picture(b"BM6..."), looks_like_picture(b"<html>")
    (True, False)
    """
    return content.startswith((_JPEG, _PNG, _BMP)) or (content[:4] == _RIFF and content[8:12] == _WEBP)


def may_be_turned(content: bytes) -> bool:
    """Whether the head has EXIF data, which may say that what is encoded lies on its side."""
    return any(mark in content[:_HEAD] for mark in _EXIF)


def encoded_size(content: bytes) -> tuple[int, int] | None:
    """Width and height in pixels that the header names; None if no known format's header is there."""
    if content.startswith(_PNG):
        return _sides(content, 16, 4, "big")
    if content.startswith(_JPEG):
        return _jpeg_size(content)
    if content.startswith(_BMP):
        return _bmp_size(content)
    if content[:4] == _RIFF and content[8:12] == _WEBP:
        return _webp_size(content)
    return None


def _sides(content: bytes, start: int, count: int, order: Literal["big", "little"]) -> tuple[int, int] | None:
    """Two unsigned numbers of `count` bytes each."""
    middle, end = start + count, start + 2 * count
    if len(content) < end:
        return None
    return int.from_bytes(content[start:middle], order), int.from_bytes(content[middle:end], order)


def jpeg_is_whole(content: bytes) -> bool:
    """Whether a JPEG's scan has its end marker, whatever follows: phones append videos and depth maps to pictures.

    Where no scan is found, whether there is such a marker near the end.
    """
    start = next((place for marker, place in _jpeg_segments(content) if marker == _JPEG_SCAN), -_NEAR_THE_END)
    return _JPEG_END in content[start:]


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Of the first frame header."""
    for marker, place in _jpeg_segments(content):
        if marker in _JPEG_FRAMES:
            sides = _sides(content, place + 5, 2, "big")
            return sides and (sides[1], sides[0])
    return None


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment with a length, in order; what follows the first scan is not to be relied on."""
    place = 2
    while (place := content.find(b"\xff", place)) >= 0 and place + 4 <= len(content):
        marker = content[place + 1]
        if marker in (0x00, 0xFF):  # stuffing or padding
            place += 1
        elif marker in _JPEG_ALONE:
            place += 2
        else:
            yield marker, place
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")


def _bmp_size(content: bytes) -> tuple[int, int] | None:
    """OS/2's old header has 16-bit sides; later ones have signed 32-bit sides, negative if stored top-down."""
    if int.from_bytes(content[14:18], "little") == 12:
        return _sides(content, 18, 2, "little")
    if len(content) < 26:
        return None
    width, height = (int.from_bytes(content[at : at + 4], "little", signed=True) for at in (18, 22))
    return abs(width), abs(height)


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Lossy, lossless and extended files each say it in their own place."""
    kind = content[12:16]
    if kind == b"VP8X":
        sides = _sides(content, 24, 3, "little")
        return sides and (sides[0] + 1, sides[1] + 1)
    if kind == b"VP8 ":
        sides = _sides(content, 26, 2, "little")
        return sides and (sides[0] & 0x3FFF, sides[1] & 0x3FFF)  # the two high bits are a scale
    if kind == b"VP8L" and len(content) >= 25:
        bits = int.from_bytes(content[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None
