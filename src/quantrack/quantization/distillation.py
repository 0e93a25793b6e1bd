"""Step: train the quantized detector to repeat the float detector's outputs; no labels needed.

Weights, biases, and the scales of weights and activations learn together through straight-through estimators, on the
calibration pictures, flipped and resized at random. The best state is chosen on calibration pictures
held back from training. References: Hinton et al. (arXiv:1503.02531); LLM-QAT (arXiv:2305.17888) for
label-free distillation of a quantized network from itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from quantrack.datasets.pictures import PAD_VALUE
from quantrack.detector.device import has_bfloat16
from quantrack.detector.heads import RawOutputTap, head_levels, raw_outputs
from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import track
from quantrack.quantization.divergence import divergence
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import require_scales
from quantrack.quantization.trainable import Rates, parameter_groups, take_over, trainable_layers, trainable_twin

PAD = PAD_VALUE / 255
CHECKS = 10
WARM_UP = 10


@dataclass(frozen=True)
class Distillation:
    """Weights become points of their grid again; zero points stay.

    Rates are Adam's, at the start of a cosine: `learning_rate` in weight steps of a 4-bit grid,
    `scale_rate` relative, `bias_rate` absolute. One picture in ten is held back to choose the best of
    the start and some ten checks. `mixed_precision` computes convolutions in bfloat16, on devices that have it.
    """

    steps: int = 240
    batch: int = 4
    learning_rate: float = 0.0005
    scale_rate: float = 0.0003
    bias_rate: float = 0.0003
    feature_weight: float = 1.0
    smallest_zoom: float = 0.6
    largest_zoom: float = 1.4
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or min(self.learning_rate, self.scale_rate, self.bias_rate) <= 0:
            raise UsageError("distillation: steps, batch and the rates must be positive")
        if self.feature_weight < 0 or not 0.1 <= self.smallest_zoom <= 1 <= self.largest_zoom <= 4:
            raise UsageError("distillation: feature_weight must not be negative; zooms must lie in 0.1..1 and 1..4")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        require_scales(job.model, "distillation")
        if not head_levels(job.model):
            raise QuantrackError(
                "distillation: the model has no detection head that Quantrack knows; leave the step out"
            )
        training, held_back = split(len(job.calibration.paths), job.seed)
        twin = trainable_twin(job.model, job.float_model)
        rates = Rates(self.learning_rate, self.scale_rate, self.bias_rate)
        optimizer = torch.optim.Adam(parameter_groups(twin, rates), betas=(0.9, 0.99))
        full = [group["lr"] for group in optimizer.param_groups]
        draw = random.Random(job.seed)
        with raw_outputs(twin) as own, raw_outputs(job.float_model) as other:
            pair = _Pair(twin, own, job.float_model, other, self.feature_weight)
            start = least = self.held_back_loss(job, pair, held_back)
            best, best_step = _state(twin), 0
            for step in track(range(1, self.steps + 1), "distillation", total=self.steps):
                for group, rate in zip(optimizer.param_groups, full, strict=True):
                    group["lr"] = rate * schedule(step, self.steps)
                self.train_once(job, pair, optimizer, draw.choices(training, k=self.batch), draw)
                if step % max(1, self.steps // CHECKS) == 0:
                    loss = self.held_back_loss(job, pair, held_back)
                    if loss < least:
                        best, best_step, least = _state(twin), step, loss
        twin.load_state_dict(best)
        take_over(job.model, trainable_layers(twin))
        return {"held_back_before": start, "held_back_after": least, "best_step": float(best_step)}

    def train_once(
        self,
        job: QuantizationJob,
        pair: _Pair,
        optimizer: torch.optim.Optimizer,
        indices: Sequence[int],
        draw: random.Random,
    ) -> None:
        """One step of the optimizer on a few pictures.

        Raises:
            QuantrackError: the loss is no longer finite.
        """
        pictures = next(job.pictures(indices, len(indices)))
        zoomed = [augmented(picture, draw, self.smallest_zoom, self.largest_zoom) for picture in pictures]
        mixed = self.mixed_precision and has_bfloat16(job.device)
        with torch.autocast(job.device.type, torch.bfloat16) if mixed else nullcontext():
            loss = pair.loss(torch.stack(zoomed))
        if not math.isfinite(float(loss.detach())):
            raise QuantrackError("distillation: the loss is not finite; lower learning_rate, scale_rate or bias_rate")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    @torch.no_grad()
    def held_back_loss(self, job: QuantizationJob, pair: _Pair, indices: Sequence[int]) -> float:
        """Mean loss on the pictures held back, as they are and in full precision."""
        losses = [len(batch) * float(pair.loss(batch)) for batch in job.pictures(indices, self.batch)]
        return sum(losses) / len(indices)


@dataclass(frozen=True)
class _Pair:
    """The detector in training and the one that it learns from."""

    student: nn.Module
    own: RawOutputTap
    teacher: nn.Module
    other: RawOutputTap
    feature_weight: float

    def loss(self, pictures: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher(pictures)
        self.student(pictures)
        return divergence(self.own.taken(), self.other.taken()).total(self.feature_weight)


def split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the pictures to train on and of those held back, one in ten but at least one.

    Raises:
        QuantrackError: there is only one picture.
    """
    if count < 2:
        raise QuantrackError("distillation: needs at least 2 calibration pictures, to hold one back; set calib_images")
    order = random.Random(seed).sample(range(count), count)
    held = max(1, count // 10)
    return sorted(order[held:]), sorted(order[:held])


def schedule(step: int, steps: int) -> float:
    """Share of the full rate: a short warm-up, then half a cosine down to 0.

    >>> schedule(1, 100), schedule(100, 100)
    (0.1, 0.0)
    """
    done = (step - min(WARM_UP, steps)) / max(1, steps - WARM_UP)
    return min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * max(0.0, done)))


def augmented(picture: Tensor, draw: random.Random, smallest_zoom: float, largest_zoom: float) -> Tensor:
    """A picture [3, S, S], flipped half of the time and resized half of the time, cropped or padded to S."""
    if draw.random() < 0.5:
        picture = picture.flip(-1)
    if draw.random() < 0.5:
        return picture
    side = picture.shape[-1]
    size = max(1, round(side * draw.uniform(smallest_zoom, largest_zoom)))
    resized = interpolate(picture[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = draw.randint(0, abs(size - side)), draw.randint(0, abs(size - side))
    if size >= side:
        return resized[:, top : top + side, left : left + side]
    padded = picture.new_full(picture.shape, PAD)
    padded[:, top : top + size, left : left + size] = resized
    return padded


def _state(twin: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in twin.state_dict().items()}
