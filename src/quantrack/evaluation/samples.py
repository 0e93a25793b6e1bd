"""Sample pictures: ground truth and detections side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from quantrack.datasets.coco import Category, EvaluationSet, Picture, TrueBox
from quantrack.datasets.pictures import read_picture
from quantrack.evaluation.types import Detection

PANEL_SIDE = 640  # the longer side of each panel, in pixels
TITLE_HEIGHT = 34
GAP = 6
FONT = cv2.FONT_HERSHEY_SIMPLEX
TITLE_FONT, LABEL_FONT = 0.65, 0.45
LABEL_PAD = 3
INK = (35, 35, 35)
PAPER = (255, 255, 255)
GOLDEN_RATIO = 0.618033988749895

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class _Mark:
    """One box to draw, in the picture's pixels."""

    xywh: tuple[float, float, float, float]
    text: str
    colour: Colour


def choose_samples(evaluation_set: EvaluationSet, count: int = 8) -> tuple[Picture, ...]:
    """Up to `count` pictures, evenly spaced over those with ground truth; always the same ones."""
    annotated = {box.image_id for box in evaluation_set.boxes}
    candidates = [picture for picture in evaluation_set.pictures if picture.id in annotated]
    count = min(count, len(candidates))
    return tuple(candidates[index * len(candidates) // count] for index in range(count))


def sample_picture(
    picture: Picture,
    truth: Sequence[TrueBox],
    float_detections: Sequence[Detection] | None,
    detections: Sequence[Detection],
    categories: Sequence[Category],
    threshold: float = 0.25,
) -> NDArray[np.uint8]:
    """Draw panels 'ground truth', 'float32', 'quantized' of one picture beside each other.

    Boxes of other pictures and detections scored below `threshold` are left out. Without
    `float_detections` (a baseline) the panels are 'ground truth' and 'detections'.

    Returns:
        RGB, shape [height, width, 3]; each panel's longer side is 640 pixels.

    Raises:
        QuantrackError: the picture cannot be read.
    """
    names = {category.id: category.name for category in categories}
    panels = [("ground truth", _true_marks(picture, truth, names))]
    if float_detections is None:
        panels.append(("detections", _marks(picture, detections, names, threshold)))
    else:
        panels.append(("float32", _marks(picture, float_detections, names, threshold)))
        panels.append(("quantized", _marks(picture, detections, names, threshold)))
    pixels = np.ascontiguousarray(read_picture(picture.path)[:, :, ::-1])
    drawn = [_panel(pixels, title, marks) for title, marks in panels]
    spacer = np.full((drawn[0].shape[0], GAP, 3), PAPER, dtype=np.uint8)
    parts = [part for panel in drawn for part in (spacer, panel)][1:]
    return np.concatenate(parts, axis=1)


def split_panels(sample: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The panels of a picture that `sample_picture` drew: title bars are dark, the gaps between them are not."""
    gap = (sample[: TITLE_HEIGHT // 2] == PAPER).all(axis=(0, 2))
    edges = np.flatnonzero(np.diff(np.concatenate(([True], gap, [True])).astype(np.int8)))
    return [sample[:, start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def draw_detections(
    picture: NDArray[np.uint8], detections: Sequence[Detection], names: dict[int, str]
) -> NDArray[np.uint8]:
    """Draw boxes with class and score on a picture in its own size, lines and letters in proportion.

    Args:
        picture: RGB, shape [height, width, 3]; it is not changed.
        detections: of this picture; all of them are drawn.

    Returns:
        RGB of the same shape.
    """
    canvas = np.array(picture, dtype=np.uint8, order="C")
    zoom = max(1.0, max(canvas.shape[:2]) / PANEL_SIDE)
    _draw_marks(canvas, [_mark(detection, names) for detection in reversed(detections)], 1.0, zoom)
    return canvas


def class_colour(category_id: int) -> Colour:
    """A bright RGB colour that depends on the category alone.

    >>> class_colour(1) == class_colour(1), class_colour(1) == class_colour(2)
    (True, False)
    """
    hue = category_id * GOLDEN_RATIO % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _true_marks(picture: Picture, truth: Sequence[TrueBox], names: dict[int, str]) -> list[_Mark]:
    own = [box for box in truth if box.image_id == picture.id]
    return [
        _Mark(
            box.xywh,
            _name(box.category_id, names) + (" (crowd)" if box.crowd else ""),
            class_colour(box.category_id),
        )
        for box in sorted(own, key=lambda box: -box.area)
    ]


def _marks(picture: Picture, detections: Sequence[Detection], names: dict[int, str], threshold: float) -> list[_Mark]:
    """The weakest first, so that the strongest lie on top."""
    own = [one for one in detections if one.image_id == picture.id and one.score >= threshold]
    return [_mark(detection, names) for detection in sorted(own, key=lambda detection: detection.score)]


def _mark(detection: Detection, names: dict[int, str]) -> _Mark:
    text = f"{_name(detection.category_id, names)} {detection.score:.2f}"
    return _Mark(detection.xywh, text, class_colour(detection.category_id))


def _name(category_id: int, names: dict[int, str]) -> str:
    return names.get(category_id, f"class {category_id}")


def _panel(pixels: NDArray[np.uint8], title: str, marks: Sequence[_Mark]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    scale = PANEL_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.array(cv2.resize(pixels, size, interpolation=interpolation), dtype=np.uint8)
    _draw_marks(canvas, marks, scale)
    return np.concatenate((_title_bar(title, size[0], len(marks)), canvas), axis=0)


def _draw_marks(canvas: NDArray[np.uint8], marks: Sequence[_Mark], scale: float, zoom: float = 1.0) -> None:
    """Boxes first, labels over all of them; canvas pixel = picture pixel * scale, `zoom` widens lines and letters."""
    for mark in marks:
        x, y, box_width, box_height = (value * scale for value in mark.xywh)
        corner = (round(x + box_width), round(y + box_height))
        cv2.rectangle(canvas, (round(x), round(y)), corner, mark.colour, round(2 * zoom), cv2.LINE_AA)
    for mark in marks:
        _draw_label(canvas, mark, scale, zoom)


def _draw_label(canvas: NDArray[np.uint8], mark: _Mark, scale: float, zoom: float) -> None:
    """Write the text above the box, or inside where there is no room above."""
    font, stroke, pad = LABEL_FONT * zoom, round(zoom), round(LABEL_PAD * zoom)
    (width, height), baseline = cv2.getTextSize(mark.text, FONT, font, stroke)
    full_width, full_height = width + 2 * pad, height + baseline + pad
    left = max(0, min(round(mark.xywh[0] * scale) - 1, canvas.shape[1] - full_width))
    top = round(mark.xywh[1] * scale) - full_height
    if top < 0:
        top = max(0, min(top + full_height, canvas.shape[0] - full_height))
    cv2.rectangle(canvas, (left, top), (left + full_width, top + full_height), mark.colour, cv2.FILLED)
    place = (left + pad, top + full_height - baseline)
    cv2.putText(canvas, mark.text, place, FONT, font, _ink_on(mark.colour), stroke, cv2.LINE_AA)


def _ink_on(colour: Colour) -> Colour:
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return INK if luminance > 120 else PAPER


def _title_bar(title: str, width: int, boxes: int) -> NDArray[np.uint8]:
    bar = np.full((TITLE_HEIGHT, width, 3), INK, dtype=np.uint8)
    cv2.putText(bar, title, (10, 23), FONT, TITLE_FONT, PAPER, 1, cv2.LINE_AA)
    count = f"{boxes} box" if boxes == 1 else f"{boxes} boxes"
    count_width = cv2.getTextSize(count, FONT, LABEL_FONT, 1)[0][0]
    title_width = cv2.getTextSize(title, FONT, TITLE_FONT, 1)[0][0]
    if title_width + count_width + 30 <= width:
        cv2.putText(bar, count, (width - count_width - 10, 22), FONT, LABEL_FONT, (190, 190, 190), 1, cv2.LINE_AA)
    return bar
