"""What evaluation produces: detections and the metrics made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Detection:
    """One scored box as (x, y, width, height) in the picture's own pixels."""

    image_id: int
    category_id: int
    xywh: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class ClassResult:
    """One class's average precision; None where the class has no ground truth in the set."""

    name: str
    ap50_95: float | None
    ap50: float | None
    boxes: int


@dataclass(frozen=True)
class CocoResult:
    """pycocotools' summary of one evaluation.

    `metrics` holds only what was measured (a size range without ground truth is absent).
    `precision_at_50` is the precision at IoU 0.5 over `recall_thresholds`, averaged over the
    classes that have ground truth.
    """

    metrics: dict[str, float]
    classes: tuple[ClassResult, ...]
    recall_thresholds: NDArray[np.float64]
    precision_at_50: NDArray[np.float64]
    precision_at_75: NDArray[np.float64]
