"""One picture in, named boxes in its own pixels out: the core of the served model and of `quantrack predict`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantrack.datasets.picture_size import KNOWN_FORMATS, encoded_size, looks_like_picture
from quantrack.datasets.pictures import content_problem, decode_picture, letterbox
from quantrack.errors import QuantrackError, UsageError
from quantrack.evaluation.decode import NmsSettings, decode
from quantrack.evaluation.types import Detection
from quantrack.onnx.inspect import ModelFacts, read_facts
from quantrack.runtime.session import Session, open_session
from quantrack.schemes import MAX_DETECTIONS

CONFIDENCE = 0.25
MAX_PIXELS = 100_000_000  # decoded, such a picture takes 300 MB
_SHOWN = 60  # characters of a wrong text that an error repeats


@dataclass(frozen=True)
class PictureDetector:
    """An open ONNX file and what it says of itself. Several threads may use one."""

    session: Session
    facts: ModelFacts

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The id of each class: the annotation file's where the ONNX file has them, else the class index."""
        return self.facts.category_ids or tuple(range(len(self.facts.class_names)))

    @property
    def names(self) -> dict[int, str]:
        """Class names by id."""
        return dict(zip(self.category_ids, self.facts.class_names, strict=True))

    def detect(self, picture: NDArray[np.uint8], settings: NmsSettings, image_id: int = 0) -> list[Detection]:
        """Detections in a BGR picture, shape [height, width, 3], best score first.

        They are those that the evaluation makes of the picture, as far as `settings` keep them.

        Raises:
            QuantrackError: the network's output is not its head's, or is not finite.
        """
        image, fit = letterbox(picture, self.session.imgsz)
        output = self.session.run(image[None])[0]
        found = decode(output, self.facts.head, fit, image_id, self.category_ids, settings)
        return found[: settings.max_detections]

    def records(self, detections: Sequence[Detection]) -> list[dict[str, object]]:
        """Detections as JSON: `box` [x1, y1, x2, y2] in pixels, `class`, `class_id`, `score`."""
        names = self.names
        return [
            {
                "box": [x, y, x + width, y + height],
                "class": names[found.category_id],
                "class_id": found.category_id,
                "score": found.score,
            }
            for found in detections
            for x, y, width, height in (found.xywh,)
        ]


def open_picture_detector(path: Path, provider: str) -> PictureDetector:
    """Open an ONNX file that Quantrack exported.

    Raises:
        QuantrackError: there is no such file, ONNX Runtime refuses it, it was not exported by Quantrack
            (its head and class names are unknown), or the provider is not there.
    """
    facts = read_facts(path)
    if facts is None:
        raise QuantrackError(
            f"onnx={path}: not exported by Quantrack, so its head and class names are unknown; "
            "give a file or model that ptq or baseline made"
        )
    return PictureDetector(open_session(path, provider), facts)


def detection_settings(confidence: float = CONFIDENCE, max_detections: int = MAX_DETECTIONS) -> NmsSettings:
    """Which detections are kept: scores above `confidence`, at most `max_detections` of a picture.

    Raises:
        UsageError: a value is out of range.
    """
    if not 0 <= confidence <= 1:
        raise UsageError(f"confidence={confidence}: must be between 0 and 1")
    if max_detections < 1:
        raise UsageError(f"max_detections={max_detections}: must be at least 1")
    return NmsSettings(confidence=confidence, max_detections=max_detections)


def to_picture(source: object) -> NDArray[np.uint8]:
    """Any form of a picture as BGR, shape [height, width, 3].

    Args:
        source: a file's path, the file's bytes, those bytes as base64 text (a data URI too), or an RGB
            array, uint8, shape [height, width, 3]. A text is base64 if it decodes to a known format's
            first bytes; otherwise it is a path.

    Raises:
        QuantrackError: it is no such thing, broken or larger than 100 million pixels.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source))
    if isinstance(source, str):
        content = _base64_content(source)
        if content is not None and looks_like_picture(content):
            return _from_bytes(content)
    if isinstance(source, str | Path):
        return _from_file(source)
    raise QuantrackError(f"{type(source).__name__} is no picture; give a path, bytes, base64 text or an RGB array")


def base64_picture(source: object) -> NDArray[np.uint8]:
    """A picture that a stranger sent, as BGR, shape [height, width, 3]: base64 text, and nothing else.

    Raises:
        QuantrackError: it is anything else, broken or larger than 100 million pixels.
    """
    if not isinstance(source, str):
        raise QuantrackError(f"{type(source).__name__} is no picture; send the picture file's bytes as base64 text")
    content = _base64_content(source)
    if content is None:
        raise QuantrackError(
            f"{_shown(source)} is not base64; send the picture file's bytes as base64 text (no path or URL is read)"
        )
    return _from_bytes(content)


def _from_array(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    shape = list(array.shape)
    if array.dtype != np.uint8 or array.ndim != 3 or shape[2] != 3 or 0 in shape:
        raise QuantrackError(
            f"array of {array.dtype} with shape {shape} is no picture; give RGB as uint8, shape [height, width, 3]"
        )
    _check_size(shape[1], shape[0])
    return np.ascontiguousarray(array[:, :, ::-1], dtype=np.uint8)


def _from_bytes(content: bytes) -> NDArray[np.uint8]:
    problem = content_problem(content)
    if problem is not None:
        raise QuantrackError(f"{problem}; give the whole picture file")
    size = encoded_size(content)
    if size is None:
        raise QuantrackError(f"not a {KNOWN_FORMATS} picture; convert it")
    _check_size(*size)
    picture = decode_picture(content)
    if picture is None:
        raise QuantrackError("truncated or damaged picture; give the whole file")
    return picture


def _base64_content(text: str) -> bytes | None:
    """The bytes behind base64 text, with or without line breaks or a data URI's head; None if it is not base64."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:  # binascii.Error is one; so is text that is not ASCII
        return None


def _from_file(source: str | Path) -> NDArray[np.uint8]:
    path, shown = Path(source), _shown(str(source))
    or_text = ", and no base64 of a picture" if isinstance(source, str) else ""
    try:
        if path.is_dir():
            raise QuantrackError(f"{shown}: a folder; give a picture file")
        if not path.is_file():
            raise QuantrackError(f"{shown}: no such file{or_text}")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise QuantrackError(f"{shown}: cannot be read ({reason}){or_text}") from error
    try:
        return _from_bytes(content)
    except QuantrackError as error:
        raise QuantrackError(f"{shown}: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise QuantrackError(
            f"{width} x {height} pixels are too many (at most {MAX_PIXELS:,}); make the picture smaller"
        )


def _shown(text: str) -> str:
    """A text's beginning on one line: it may be megabytes of broken base64."""
    return repr(str(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
