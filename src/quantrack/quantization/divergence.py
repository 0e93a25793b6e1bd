"""How far a quantized detector's raw outputs are from the float detector's, without labels.

Scores are compared as probabilities (Brier's squared difference), box outputs as distributions, weighed
by the float detector's own score (Zheng et al., "Localization Distillation", arXiv:2102.12252): so
what no detection shows, the thousands of background positions, counts next to nothing. Comparing
scores by Kullback-Leibler divergence instead was tried: it halved while mAP did not move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, max_pool2d

from quantrack.detector.heads import RawOutputs

BOX_SIDES = 4
SCORE_WEIGHT = 4.0


@dataclass(frozen=True)
class Divergence:
    """Three sums, each 0 where both detectors agree; scalars that gradients flow through.

    `scores` and `boxes` are per object that the float detector expects to see; `features` is the
    squared error of the head's inputs over their variance, summed over levels.
    """

    scores: Tensor
    boxes: Tensor
    features: Tensor

    @property
    def outputs(self) -> Tensor:
        """Scores and boxes together, so weighed that both are of one size for a detector at 4 bits."""
        return SCORE_WEIGHT * self.scores + self.boxes

    def total(self, feature_weight: float) -> Tensor:
        """The outputs, and the feature term times its weight."""
        return self.outputs + feature_weight * self.features


def divergence(student: RawOutputs, teacher: RawOutputs) -> Divergence:
    """Compare one batch's raw outputs, position by position."""
    return _divergence(student, teacher, lambda own, other: (own - other).square())


def detection_divergence(student: RawOutputs, teacher: RawOutputs) -> Divergence:
    """As `divergence`, but a score that moves to a neighbouring position of its level costs nothing.

    A one-to-one head leaves each object to one position. Where two neighbours are nearly as good, rounding decides
    which of them takes it: the same detection, which position by position would be one missed and one made up. A
    single such picture can be nearly all of a mean over a few.
    """
    return _divergence(student, teacher, missed_and_made_up)


def missed_and_made_up(own: Tensor, other: Tensor) -> Tensor:
    """The squares of what scores [B, C, H, W] lack of the others' and have beyond them, each within a position.

    >>> object_here = torch.tensor([[[[0.0, 0.0, 0.9, 0.0, 0.0, 0.0]]]])
    >>> float(missed_and_made_up(object_here.roll(1), object_here).sum())
    0.0
    >>> round(float(missed_and_made_up(object_here.roll(3), object_here).sum()), 2)
    1.62
    """
    missed, made_up = other - highest_nearby(own), own - highest_nearby(other)
    return missed.clamp_min(0).square() + made_up.clamp_min(0).square()


def highest_nearby(scores: Tensor) -> Tensor:
    """The highest of each score [B, C, H, W] and its neighbours'."""
    return max_pool2d(scores, kernel_size=3, stride=1, padding=1)


def _divergence(
    student: RawOutputs, teacher: RawOutputs, score_errors: Callable[[Tensor, Tensor], Tensor]
) -> Divergence:
    scores = [logits.float().sigmoid() for logits in teacher.classes]
    peaks = [score.amax(dim=1) for score in scores]
    objects = torch.stack([peak.sum() for peak in peaks]).sum().clamp_min(1.0)
    differences = [
        score_errors(own.float().sigmoid(), score).sum() for own, score in zip(student.classes, scores, strict=True)
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
        torch.stack(differences).sum() / objects, torch.stack(boxes).sum() / objects, torch.stack(features).sum()
    )


def box_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of box outputs [B, 4 * bins, H, W] at each position, shape [B, H, W].

    With several bins a side (distribution focal loss, arXiv:2006.04388) that of the distributions;
    with one, the mean absolute difference in strides.
    """
    if student.shape[1] == BOX_SIDES:
        return l1_loss(student, teacher, reduction="none").mean(dim=1)
    own, other = (bins_of(side).log_softmax(dim=2) for side in (student, teacher))
    return (other.exp() * (other - own)).sum(dim=(1, 2)).clamp_min(0)  # below 0 only by rounding


def bins_of(boxes: Tensor) -> Tensor:
    """[B, 4 * bins, H, W] as [B, 4, bins, H, W]."""
    batch, channels, height, width = boxes.shape
    return boxes.reshape(batch, BOX_SIDES, channels // BOX_SIDES, height, width)
