"""From one picture's raw network output to detections in the picture's own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms

from quantrack.datasets.pictures import Letterbox
from quantrack.errors import NotFiniteError, QuantrackError
from quantrack.evaluation.types import Detection
from quantrack.schemes import MAX_DETECTIONS, ONE2MANY, ONE2ONE


@dataclass(frozen=True)
class NmsSettings:
    """What counts as a detection; the defaults are those of Ultralytics' validation.

    `confidence` holds for both heads, the rest only for one2many, whose boxes overlap.
    """

    confidence: float = 0.001
    iou: float = 0.7
    max_detections: int = MAX_DETECTIONS
    max_candidates: int = 30000


DEFAULT_NMS = NmsSettings()


def decode(
    output: NDArray[np.float32],
    head: str,
    fit: Letterbox,
    image_id: int,
    category_ids: Sequence[int],
    settings: NmsSettings = DEFAULT_NMS,
) -> list[Detection]:
    """Decode one picture's output (without the batch axis) of the named head, best score first.

    Raises:
        QuantrackError: unknown head, unexpected shape or class, or values that are not finite.
    """
    if head == ONE2ONE:
        return decode_one2one(output, fit, image_id, category_ids, settings)
    if head == ONE2MANY:
        return decode_one2many(output, fit, image_id, category_ids, settings)
    raise QuantrackError(f"head={head}: unknown; use {ONE2ONE} or {ONE2MANY}")


def decode_one2one(
    output: NDArray[np.float32],
    fit: Letterbox,
    image_id: int,
    category_ids: Sequence[int],
    settings: NmsSettings = DEFAULT_NMS,
) -> list[Detection]:
    """Decode the NMS-free head.

    Args:
        output: shape [N, 6]: x1, y1, x2, y2 in network pixels, score, class index.
        category_ids: the annotation file's category of each class index.

    Raises:
        QuantrackError: unexpected shape or class, or values that are not finite.
    """
    if output.ndim != 2 or output.shape[1] != 6:
        raise QuantrackError(f"picture {image_id}: {ONE2ONE} output has shape {list(output.shape)}, not [N, 6]")
    _check_finite(output, image_id)
    rows = output[output[:, 4] > settings.confidence]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    return _detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64), fit, image_id, category_ids)


def decode_one2many(
    output: NDArray[np.float32],
    fit: Letterbox,
    image_id: int,
    category_ids: Sequence[int],
    settings: NmsSettings = DEFAULT_NMS,
) -> list[Detection]:
    """Decode the one-to-many head through class-aware, multi-label NMS.

    Every (anchor, class) pair whose score exceeds the confidence is a candidate of its own.

    Args:
        output: shape [4 + classes, anchors]: centre x, centre y, width, height in network pixels,
            then one score per class.
        category_ids: the annotation file's category of each class index.

    Raises:
        QuantrackError: unexpected shape, or values that are not finite.
    """
    if output.ndim != 2 or output.shape[0] != 4 + len(category_ids):
        expected = f"[{4 + len(category_ids)}, anchors]"
        raise QuantrackError(f"picture {image_id}: {ONE2MANY} output has shape {list(output.shape)}, not {expected}")
    _check_finite(output, image_id)
    classes, anchors = np.nonzero(output[4:] > settings.confidence)
    scores = output[4:][classes, anchors]
    best = np.argsort(-scores, kind="stable")[: settings.max_candidates]
    classes, anchors, scores = classes[best], anchors[best], scores[best]
    centre, half = output[:2, anchors].T, output[2:4, anchors].T * np.float32(0.5)
    corners = np.concatenate((centre - half, centre + half), axis=1)
    kept = _suppress(corners, scores, classes, settings)
    return _detections(corners[kept], scores[kept], classes[kept], fit, image_id, category_ids)


def _suppress(
    corners: NDArray[np.float32],
    scores: NDArray[np.float32],
    classes: NDArray[np.int64],
    settings: NmsSettings,
) -> NDArray[np.int64]:
    # torchvision may set classes apart by the largest corner, and counts on none below zero
    exact = torch.from_numpy(corners).double()
    from_zero = exact - exact.min() if len(exact) else exact
    kept = batched_nms(
        from_zero,
        torch.from_numpy(scores).double(),
        torch.from_numpy(classes),
        settings.iou,
    )
    return np.asarray(kept[: settings.max_detections].numpy(), dtype=np.int64)


def _check_finite(output: NDArray[np.float32], image_id: int) -> None:
    if not np.isfinite(output).all():
        raise NotFiniteError(
            f"picture {image_id}: the network's output has NaN or infinite values; "
            "its scales or float16 overflow: try other calibration pictures, more activation bits or precision=fp32"
        )


def _detections(
    corners: NDArray[np.float32],
    scores: NDArray[np.float32],
    classes: NDArray[np.int64],
    fit: Letterbox,
    image_id: int,
    category_ids: Sequence[int],
) -> list[Detection]:
    unknown = classes[(classes < 0) | (classes >= len(category_ids))]
    if unknown.size:
        raise QuantrackError(
            f"picture {image_id}: the network names class {unknown[0]}, but the annotation file "
            f"has {len(category_ids)} categories; use the data the detector was trained for"
        )
    offset = np.array([fit.left, fit.top] * 2, dtype=np.float64)
    limit = np.array([fit.width, fit.height] * 2, dtype=np.float64)
    own = np.clip((corners - offset) / fit.scale, 0.0, limit)
    sizes = np.maximum(own[:, 2:] - own[:, :2], 0.0)
    return [
        Detection(image_id, int(category_ids[index]), (x, y, width, height), score)
        for (x, y), (width, height), index, score in zip(
            own[:, :2].tolist(), sizes.tolist(), classes.tolist(), scores.tolist(), strict=True
        )
    ]
