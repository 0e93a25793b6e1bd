"""How far ONNX Runtime's outputs are from PyTorch's, on real pictures.

Boxes are compared as a fraction of the input's side, so that they and the scores share one scale.
A quantized network agrees only statistically: a value on a rounding edge may fall either way.
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

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]
SHOWN_SCORE = 0.05  # below it, the order of one-to-one rows is noise


@dataclass(frozen=True)
class Parity:
    """Mean and largest absolute difference; `unmatched` one-to-one detections had no partner.

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
    differences: list[NDArray[np.float32]] = []
    pictures = unmatched = 0
    for image in inputs:
        expected = reference(image[None])[0]
        actual = session.run(image[None])[0]
        if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
            raise QuantrackError(f"{session.path}: the output is not finite; check the weights")
        if head == "one2one":
            expected, actual, lost = match_rows(expected, actual)
            unmatched += lost
        else:
            expected, actual = expected.T, actual.T
        scale = np.ones(expected.shape[1], np.float32)
        scale[:4] = session.imgsz
        differences.append(np.abs(expected - actual) / scale)
        pictures += 1
    values = np.concatenate([difference.ravel() for difference in differences])
    if values.size == 0:
        return Parity(None, None, pictures, unmatched)
    return Parity(float(values.mean()), float(values.max()), pictures, unmatched)


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
) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Pair one-to-one rows [300, 6] by class and nearest box; rows are sorted by score, which may swap.

    Returns:
        The paired (box, score) rows of both, shape [pairs, 5], and how many rows found no partner.
    """
    left: list[NDArray[np.float32]] = []
    right: list[NDArray[np.float32]] = []
    shown = expected[expected[:, 4] >= SHOWN_SCORE]
    free = np.ones(len(actual), bool)
    for row in shown:
        same = np.flatnonzero(free & (actual[:, 5] == row[5]))
        if len(same) == 0:
            continue
        nearest = same[np.abs(actual[same, :4] - row[:4]).sum(axis=1).argmin()]
        free[nearest] = False
        left.append(row[:5])
        right.append(actual[nearest, :5])
    empty = np.empty((0, 5), np.float32)
    pairs = (np.stack(left), np.stack(right)) if left else (empty, empty)
    return *pairs, len(shown) - len(left)
