"""Unsigned 8-bit grids for activations, chosen from observed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantrack.schemes import ACTIVATION_LEVELS

SCORES_FROM = -8.0  # a class score below sigmoid(-8) = 0.0003 is no detection
SILU_FROM = -5.0  # SiLU is within 0.034 of zero below


@dataclass(frozen=True)
class ObservedRange:
    """The smallest and the largest value of a tensor over the calibration pictures."""

    minimum: float
    maximum: float


@dataclass(frozen=True)
class Grid:
    """value = scale * (integer - zero point), integers 0 to 255."""

    scale: float
    zero_point: int

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """The grid that reaches from `low` to `high` and holds zero.

        >>> Grid.over(-51.0, 204.0)
        Grid(scale=1.0, zero_point=51)
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / ACTIVATION_LEVELS, 1e-8)
        return cls(scale, round(-low / scale))

    @property
    def low(self) -> float:
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        return (ACTIVATION_LEVELS - self.zero_point) * self.scale

    @property
    def width(self) -> float:
        return ACTIVATION_LEVELS * self.scale

    def constants(self) -> Mapping[str, NDArray[np.generic]]:
        """Scale and zero point as ONNX stores them."""
        return {"scale": np.array(self.scale, np.float32), "zero_point": np.array(self.zero_point, np.uint8)}


def covering(one: Grid, other: Grid) -> Grid:
    """The grid that reaches as far as both; equal ones stay as they are."""
    return one if one == other else Grid.over(min(one.low, other.low), max(one.high, other.high))
