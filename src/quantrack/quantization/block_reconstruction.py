"""Step: learn which way each weight rounds, block by block (AdaRound, BRECQ).

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv:2004.10568), for
whole blocks as in Li et al., "BRECQ" (arXiv:2102.05426): a block's roundings are trained together so
that its output, on what the quantized blocks before it give, comes close to the float network's. The
head has no single output; its raw outputs are held against the float ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from quantrack.detector.blocks import Block, each_of, run_block, tensors_of
from quantrack.detector.heads import head_levels, raw_outputs
from quantrack.errors import UsageError
from quantrack.progress import track
from quantrack.quantization.block_walk import BlockWalk
from quantrack.quantization.divergence import divergence
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import Bits, clamp_integers, layers_of_block, require_scales
from quantrack.quantization.trainable import take_over, trainable_layers, trainable_twin

WARM_UP = 0.2  # of the iterations, without a pull towards a decision
FIRST_EXPONENT, LAST_EXPONENT = 20.0, 2.0
STRETCH = (-0.1, 1.1)  # of the rectified sigmoid, AdaRound's equation 23


class SoftRounding(nn.Module):
    """Between floor and ceiling by a learned share `h` of each weight; `harden` makes it 0 or 1."""

    def __init__(self, units: Tensor, bits: Bits) -> None:
        super().__init__()
        inside = clamp_integers(units.detach(), bits)
        self.bits = bits
        self.floor = inside.floor()
        low, high = STRETCH
        share = ((inside - self.floor - low) / (high - low)).clamp(1e-4, 1 - 1e-4)
        self.alpha = nn.Parameter(share.logit())

    def share(self) -> Tensor:
        """The rectified sigmoid, in 0..1."""
        low, high = STRETCH
        return (self.alpha.sigmoid() * (high - low) + low).clamp(0, 1)

    def forward(self, units: Tensor) -> Tensor:
        return clamp_integers(self.floor + self.share(), self.bits)

    def undecided(self, exponent: float) -> Tensor:
        """Zero where every share is 0 or 1; AdaRound's equation 24."""
        return (1 - (2 * self.share() - 1).abs().pow(exponent)).sum()

    def harden(self, units: Tensor) -> Tensor:
        """The integers that the shares decided for."""
        return clamp_integers(self.floor + (self.share() >= 0.5), self.bits)


@dataclass(frozen=True)
class BlockReconstruction:
    """Weights become points of their grid, scales stay. A block keeps what it had where nothing better is learned.

    `iterations` a block, each on `batch` pictures. `decision_weight` weighs the pull towards a
    decision, whose exponent falls from 20 to 2 after the first fifth.
    """

    iterations: int = 300
    batch: int = 4
    learning_rate: float = 0.01
    decision_weight: float = 0.1
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        if min(self.iterations, self.batch) < 1 or min(self.learning_rate, self.decision_weight, self.memory_gb) <= 0:
            raise UsageError("block_reconstruction: all settings must be positive")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        if job.scheme.weight_bits >= 8:
            return {}
        require_scales(job.model, "block_reconstruction")
        draw = random.Random(job.seed)
        twin = trainable_twin(job.model, job.float_model)
        before = after = 0.0
        with (
            BlockWalk(job.float_model, job.batches(), job.device, self.memory_gb) as reference,
            BlockWalk(job.model, job.batches(), job.device, self.memory_gb) as walk,
        ):
            for block in track(walk.blocks, "block reconstruction"):
                if layers_of_block(job.model, block):
                    errors = self.train_block(_Comparison(job, twin, reference, walk, block), draw)
                    before, after = before + errors[0], after + errors[1]
                reference.advance(block)
                walk.advance(block)
        return {"error_before": before, "error_after": after}

    def train_block(self, compare: _Comparison, draw: random.Random) -> tuple[float, float]:
        """Train one block's roundings; its loss with rounding to nearest, and with the learned ones."""
        before = compare.mean_loss()
        layers = compare.layers
        roundings = {name: SoftRounding(layer.units, layer.bits_of_weights) for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.set_rounding(roundings[name])
        optimizer = torch.optim.Adam([rounding.alpha for rounding in roundings.values()], lr=self.learning_rate)
        weights = sum(rounding.alpha.numel() for rounding in roundings.values())
        for step in range(self.iterations):
            loss = compare.loss(*compare.drawn(self.batch, draw))
            exponent = decision_exponent(step / self.iterations)
            if exponent is not None:
                undecided = torch.stack([rounding.undecided(exponent) for rounding in roundings.values()]).sum()
                loss = loss + self.decision_weight * undecided / weights
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, layer in layers.items():
            layer.set_rounding(roundings[name].harden)
        after = compare.mean_loss()
        if after >= before:
            for layer in layers.values():
                layer.set_rounding(layer.round_straight_through)
        take_over(compare.job.model, layers)
        return before, min(before, after)


def decision_exponent(progress: float) -> float | None:
    """The exponent of the pull towards a decision at a share of the training; None while it warms up.

    >>> decision_exponent(0.1), decision_exponent(0.2), decision_exponent(1.0)
    (None, 20.0, 2.0)
    """
    if progress < WARM_UP:
        return None
    done = (progress - WARM_UP) / (1 - WARM_UP)
    return LAST_EXPONENT + (FIRST_EXPONENT - LAST_EXPONENT) * 0.5 * (1 + math.cos(math.pi * done))


class _Comparison:
    """One block in training against the float network's."""

    def __init__(
        self, job: QuantizationJob, twin: nn.Module, reference: BlockWalk, walk: BlockWalk, block: Block
    ) -> None:
        self.job, self.twin, self.reference, self.walk, self.block = job, twin, reference, walk, block
        self.layers = {name: layer for name, layer in trainable_layers(self.twin).items() if block.holds(name)}
        self.is_head = block == walk.blocks[-1] and bool(head_levels(job.model))

    def drawn(self, count: int, draw: random.Random) -> tuple[int, Tensor]:
        """A batch at random, and that many of its pictures."""
        (batch,) = draw.choices(range(self.walk.batch_count), weights=self.walk.sizes)
        size = self.walk.sizes[batch]
        return batch, torch.tensor(draw.sample(range(size), min(count, size)))

    def loss(self, batch: int, rows: Tensor) -> Tensor:
        """Squared error of the block's output over its variance; of the head, the divergence."""
        inputs, float_inputs = (
            [each_of(kept, lambda one: one[rows]) for kept in walk.inputs(self.block, batch)]
            for walk in (self.walk, self.reference)
        )
        if self.is_head:
            with raw_outputs(self.twin) as own, raw_outputs(self.job.float_model) as other:
                run_block(self.twin, self.block, inputs)
                with torch.no_grad():
                    run_block(self.job.float_model, self.block, float_inputs)
                return divergence(own.taken(), other.taken()).total(feature_weight=0.0)
        outputs = tensors_of(run_block(self.twin, self.block, inputs))
        with torch.no_grad():
            targets = tensors_of(run_block(self.job.float_model, self.block, float_inputs))
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([mse_loss(own, other) / other.var().clamp_min(1e-12) for own, other in pairs]).mean()

    @torch.no_grad()
    def mean_loss(self) -> float:
        """Over all calibration pictures."""
        losses = []
        for batch, size in enumerate(self.walk.sizes):
            losses.append(size * float(self.loss(batch, torch.arange(size))))
        return sum(losses) / len(self.job.calibration.paths)
