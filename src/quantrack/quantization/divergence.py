"""How far a quantized detector's raw outputs are from the float detector's, without labels.

Knowledge distillation's losses (Hinton et al., arXiv:1503.02531; for box distributions Zheng et al.,
"Localization Distillation", arXiv:2102.12252): the float detector's own scores say where objects are,
and errors there weigh most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

from quantrack.detector.heads import RawOutputs

BOX_SIDES = 4


@dataclass(frozen=True)
class Divergence:
    """Three sums, each 0 where both detectors agree; scalars that gradients flow through.

    `classes` and `boxes` are per object that the float detector expects to see; `features` is the
    squared error of the head's inputs over their variance, summed over levels.
    """

    classes: Tensor
    boxes: Tensor
    features: Tensor

    def total(self, feature_weight: float) -> Tensor:
        """Class and box terms, and the feature term times its weight."""
        return self.classes + self.boxes + feature_weight * self.features


def divergence(student: RawOutputs, teacher: RawOutputs) -> Divergence:
    """Compare one batch's raw outputs."""
    scores = [logits.float().sigmoid() for logits in teacher.classes]
    peaks = [score.amax(dim=1) for score in scores]
    objects = torch.stack([peak.sum() for peak in peaks]).sum().clamp_min(1.0)
    classes = [
        bernoulli_divergence(own.float(), other.float(), score).sum()
        for own, other, score in zip(student.classes, teacher.classes, scores, strict=True)
    ]
    boxes = [
        (box_divergence(own.float(), other.float()) * peak).sum()
        for own, other, peak in zip(student.boxes, teacher.boxes, peaks, strict=True)
    ]
    features = [
        (own.float() - other.float()).square().mean() / other.float().var().clamp_min(1e-12)
        for own, other in zip(student.features, teacher.features, strict=True)
    ]
    return Divergence(
        torch.stack(classes).sum() / objects, torch.stack(boxes).sum() / objects, torch.stack(features).sum()
    )


def bernoulli_divergence(student: Tensor, teacher: Tensor, scores: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each class score from the teacher's, from logits; elementwise."""
    cross = binary_cross_entropy_with_logits(student, scores, reduction="none")
    return cross - binary_cross_entropy_with_logits(teacher, scores, reduction="none")


def box_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of box outputs [B, 4 * bins, H, W] at each position, shape [B, H, W].

    With several bins a side (distribution focal loss, arXiv:2006.04388) that of the distributions;
    with one, the mean absolute difference in strides.
    """
    if student.shape[1] == BOX_SIDES:
        return l1_loss(student, teacher, reduction="none").mean(dim=1)
    own, other = (_bins(side).log_softmax(dim=2) for side in (student, teacher))
    return (other.exp() * (other - own)).sum(dim=(1, 2))


def _bins(boxes: Tensor) -> Tensor:
    """[B, 4 * bins, H, W] as [B, 4, bins, H, W]."""
    batch, channels, height, width = boxes.shape
    return boxes.reshape(batch, BOX_SIDES, channels // BOX_SIDES, height, width)
