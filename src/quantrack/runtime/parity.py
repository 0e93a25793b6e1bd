"""How far ONNX Runtime's outputs are from PyTorch's, on real pictures.

What either of the two detects is compared; nearly all other positions are background, whose equal zeros say nothing.
Boxes count as a fraction of the input's side, so that they and the scores share one scale. A quantized network agrees
only statistically: a value on a rounding edge may fall either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantrack.errors import QuantrackError
from quantrack.runtime.session import Session
from quantrack.schemes import ONE2MANY, ONE2ONE

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]
SHOWN_SCORE = 0.05  # below it, the order of one-to-one rows is noise


@dataclass(frozen=True)
class Parity:
    """Mean and largest absolute difference; `unmatched` one-to-one detections of either had no partner.

    The differences are None where no picture had a detection to compare.
    """

    mean_abs: float | None
    max_abs: float | None
    pictures: int
    unmatched: int

    def metrics(self) -> dict[str, float]:
        counted = {"parity_unmatched": float(self.unmatched)}
        if self.mean_abs is None or self.max_abs is None:
            return counted
        return counted | {"parity_mean_abs": self.mean_abs, "parity_max_abs": self.max_abs}


def measure_parity(reference: Network, session: Session, inputs: Iterable[NDArray[np.float32]], head: str) -> Parity:
    """Run the same pictures [3, imgsz, imgsz] through both.

    Raises:
        QuantrackError: an output is not finite.
    """
    if head == ONE2ONE:
        compare = one2one_differences
    elif head == ONE2MANY:
        compare = one2many_differences
    else:
        raise QuantrackError(f"head={head}: unknown; use {ONE2ONE} or {ONE2MANY}")
    differences: list[NDArray[np.float32]] = []
    pictures = unmatched = 0
    for image in inputs:
        expected = reference(image[None])[0]
        actual = session.run(image[None])[0]
        if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
            raise QuantrackError(f"{session.path}: the output is not finite; check the weights")
        found, alone = compare(expected, actual, session.imgsz)
        differences.append(found)
        unmatched += alone
        pictures += 1
    values = np.concatenate(differences)
    if values.size == 0:
        return Parity(None, None, pictures, unmatched)
    return Parity(float(values.mean()), float(values.max()), pictures, unmatched)


def one2many_differences(
    expected: NDArray[np.float32], actual: NDArray[np.float32], imgsz: int
) -> tuple[NDArray[np.float32], int]:
    """Of outputs [4 + classes, anchors], which pair by themselves: the boxes and scores of what either detects."""
    shown = np.maximum(expected[4:], actual[4:]) >= SHOWN_SCORE
    apart = np.abs(expected - actual)
    return np.concatenate([apart[:4, shown.any(axis=0)].ravel() / imgsz, apart[4:][shown]]), 0


def one2one_differences(
    expected: NDArray[np.float32], actual: NDArray[np.float32], imgsz: int
) -> tuple[NDArray[np.float32], int]:
    """Of rows [300, 6]: the boxes and scores of pairs, the scores of detections of either that have no partner, and
    how many these are.
    """
    left, right, alone = match_rows(expected, actual)
    pairs = np.abs(left - right) / np.array([imgsz, imgsz, imgsz, imgsz, 1], np.float32)
    return np.concatenate([pairs.ravel(), alone]), len(alone)


def torch_network(model: nn.Module) -> Network:
    """A PyTorch detector as a function of arrays [B, 3, imgsz, imgsz]."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = model(torch.from_numpy(images).to(device)).cpu().numpy()
        return output

    return run


def require_same_outputs(one: Session, other: Session, inputs: Iterable[NDArray[np.float32]]) -> None:
    """Check that two files give the same bits for inputs [1, 3, imgsz, imgsz].

    Raises:
        QuantrackError: an output differs.
    """
    for image in inputs:
        if not np.array_equal(one.run(image), other.run(image)):
            raise QuantrackError(f"{other.path}: its outputs are not those of {one.path}; please report this")


def match_rows(
    expected: NDArray[np.float32], actual: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Pair one-to-one rows [300, 6] by class and nearest box; rows are sorted by score, which may swap.

    Each detection of `expected` takes a row of `actual`, then each of `actual` that is left a row of `expected`.

    Returns:
        The paired (box, score) rows of both, shape [pairs, 5], and the scores of detections of either without partner.
    """
    unpaired = np.ones(len(expected), bool), np.ones(len(actual), bool)
    pairs: list[tuple[int, int]] = []
    alone: list[float] = []
    for index in map(int, np.flatnonzero(expected[:, 4] >= SHOWN_SCORE)):
        partner = _nearest(expected[index], actual, unpaired[1])
        if partner is None:
            alone.append(float(expected[index, 4]))
        else:
            pairs.append((index, partner))
            unpaired[0][index] = unpaired[1][partner] = False
    for index in map(int, np.flatnonzero((actual[:, 4] >= SHOWN_SCORE) & unpaired[1])):
        partner = _nearest(actual[index], expected, unpaired[0])
        if partner is None:
            alone.append(float(actual[index, 4]))
        else:
            pairs.append((partner, index))
            unpaired[0][partner] = False
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    return expected[left, :5], actual[right, :5], np.array(alone, np.float32)


def _nearest(row: NDArray[np.float32], among: NDArray[np.float32], free: NDArray[np.bool_]) -> int | None:
    """The free row of the same class whose box is nearest; None if there is none."""
    same = np.flatnonzero(free & (among[:, 5] == row[5]))
    return int(same[np.abs(among[same, :4] - row[:4]).sum(axis=1).argmin()]) if len(same) else None
