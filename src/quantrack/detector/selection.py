"""One-to-one heads that select their 300 detections first and decode only those boxes.

Ultralytics decodes the boxes of all anchors (8,400 at 640 px), then keeps 300. The order changes
nothing that comes out, but the softmax over all distance bins alone is a seventh of YOLOv10n's time
on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def select_before_decoding(head: nn.Module) -> None:
    """Let an Ultralytics head whose one-to-one branch is chosen select before it decodes, in place."""
    kind: Any = type(head)
    head.__class__ = _selecting(kind)


@cache
def _selecting(head_type: Any) -> Any:  # noqa: ANN401 - Ultralytics is untyped
    """A head of the same kind with the order changed; a class, so that copies of the model keep it."""
    return type(f"Selecting{head_type.__name__}", (head_type,), {"_inference": _inference, "postprocess": _as_it_is})


def _inference(head: Any, outputs: dict[str, Any]) -> Tensor:  # noqa: ANN401 - Ultralytics is untyped
    """Detections [B, 6, k] as (x1, y1, x2, y2, score, class), best first.

    `outputs`: `boxes` [B, 4 * bins, anchors], `scores` [B, classes, anchors] before the sigmoid, and `feats`,
    the feature maps that give the anchors.
    """
    scores: Tensor = outputs["scores"]
    k = min(head.max_det, scores.shape[2])
    anchors = scores.amax(dim=1).topk(k).indices  # [B, k]
    boxes = _decode(head, outputs, anchors)
    # the k best pairs of anchor and class; an anchor may win with two classes
    best, pairs = _take(scores, anchors).transpose(1, 2).flatten(1).topk(k)
    winners, classes = pairs // head.nc, pairs % head.nc
    return torch.cat([_take(boxes, winners), best[:, None].sigmoid(), classes[:, None].to(boxes.dtype)], dim=1)


def _decode(head: Any, outputs: dict[str, Any], anchors: Tensor) -> Tensor:  # noqa: ANN401
    """Boxes [B, 4, k] of these anchors in network pixels."""
    centres, strides = _grid(head, outputs["feats"])
    distances = _distances(head, _take(outputs["boxes"], anchors))
    boxes: Tensor = head.decode_bboxes(distances, centres[anchors].transpose(1, 2)) * strides[anchors].transpose(1, 2)
    return boxes


def _distances(head: Any, bins: Tensor) -> Tensor:  # noqa: ANN401
    """What `head.dfl` gives: distances [B, 4, k] of `bins` [B, 4 * reg_max, k].

    The softmax goes along the last axis. Runtimes transpose for any other, which took ONNX Runtime longer than TopK.
    """
    from ultralytics.nn.modules.block import DFL

    if not isinstance(head.dfl, DFL):  # heads without a distribution have the identity
        distances: Tensor = head.dfl(bins)
        return distances
    batch, _, k = bins.shape
    shares = bins.transpose(1, 2).reshape(batch, k, 4, head.dfl.c1).softmax(3)
    distances = head.dfl.conv(shares.transpose(1, 3))  # [B, reg_max, 4, k] to [B, 1, 4, k]
    return distances.reshape(batch, 4, k)


def _grid(head: Any, features: list[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Anchor centres [anchors, 2] in cells and their strides [anchors, 1], made once for a shape of input."""
    from ultralytics.utils.tal import make_anchors

    if head.shape != features[0].shape:
        head.anchors, head.strides = make_anchors(features, head.stride, 0.5)
        head.shape = features[0].shape
    return head.anchors, head.strides


def _take(values: Tensor, indices: Tensor) -> Tensor:
    """Columns [B, C, k] of values [B, C, n] by indices [B, k]."""
    return values.gather(2, indices[:, None].expand(-1, values.shape[1], -1))


def _as_it_is(head: nn.Module, detections: Tensor) -> Tensor:
    """Nothing is left to select."""
    return detections
