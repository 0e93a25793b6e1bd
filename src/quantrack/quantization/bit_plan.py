"""A bit plan: how many bits each convolution's weights get, chosen under a budget of average bits.

Layers' errors are taken to add up, as in HAWQ-V3 (arXiv:2011.10680), which makes the choice a
multiple-choice knapsack (`knapsack`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantrack.errors import QuantrackError, UsageError
from quantrack.files import write_json
from quantrack.quantization.knapsack import least_error

BIT_RANGE = range(2, 9)
OFFERED_BITS = (3, 4, 5, 6, 7)  # not 8, which gain nothing, and which `fit_pair_sums` would coarsen
PLANNED_BY = ("layer", "channel")  # what has bits of its own
LayerBits = int | tuple[int, ...]  # of all weights of a layer, or of each output channel


def require_choice(bits: Sequence[int]) -> None:
    """Refuse what is no choice of different numbers of bits, at least two within `BIT_RANGE`.

    Raises:
        UsageError: it is none.
    """
    if len(bits) < 2 or len(set(bits)) < len(bits) or any(each not in BIT_RANGE for each in bits):
        raise UsageError(f"bits={list(bits)}: give at least two of {BIT_RANGE[0]} to {BIT_RANGE[-1]}")


@dataclass(frozen=True)
class LayerCost:
    """One convolution, or one of its channels: how many weights, and the error that each choice of bits brings."""

    name: str
    weights: int
    errors: Mapping[int, float]


@dataclass(frozen=True)
class BitPlan:
    """Weight bits by layer name, those of each output channel where they differ, for the model of `model_digest`."""

    model_digest: str
    bits: Mapping[str, LayerBits]

    def require_fits(self, model_digest: str, names: Sequence[str]) -> None:
        """Refuse a plan made for another model.

        Raises:
            QuantrackError: the weights differ, or the plan's layers are not the model's.
        """
        if self.model_digest != model_digest:
            raise QuantrackError(
                f"plan: made for model {self.model_digest[:12]}, not {model_digest[:12]}; run `sensitivity` on this one"
            )
        if odd := sorted(set(names) ^ set(self.bits)):
            raise QuantrackError(f"plan: {odd[0]} is not in both plan and model; run `sensitivity` on this model")

    def write(self, path: Path) -> None:
        """Write `plan.json`."""
        write_json(path, self.record())

    def record(self) -> dict[str, object]:
        """The content of `plan.json`."""
        return {"model_digest": self.model_digest, "bits": dict(self.bits)}

    def average(self, name: str) -> float:
        """Mean bits of one layer's weights."""
        bits = self.bits[name]
        return float(bits) if isinstance(bits, int) else sum(bits) / len(bits)


def read_plan(path: Path) -> BitPlan:
    """Read what `BitPlan.write` wrote.

    Raises:
        QuantrackError: the file is missing or is no plan.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content["model_digest"]
        bits = {name: tuple(value) if isinstance(value, list) else value for name, value in content["bits"].items()}
        well_formed = isinstance(digest, str) and all(_are_bits(value) for value in bits.values())
    except OSError as error:
        raise QuantrackError(
            f"plan={path}: cannot be read ({error.strerror}); give the plan.json of a sensitivity run"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantrackError(f"plan={path}: not a bit plan; give the plan.json of a sensitivity run") from error
    if not well_formed:
        raise QuantrackError(
            f"plan={path}: bits must be whole numbers from 2 to 8; give the plan.json of a sensitivity run"
        )
    return BitPlan(digest, bits)


def _are_bits(value: object) -> bool:
    values = value if isinstance(value, tuple) and value else (value,)
    return all(type(each) is int and each in BIT_RANGE for each in values)


def solve_bits(costs: Sequence[LayerCost], average_bits: float) -> dict[str, int]:
    """The bits of least total error whose weighted average is at most `average_bits`; proven, as `least_error` says.

    Raises:
        UsageError: even the fewest bits of every layer exceed the budget.

    >>> solve_bits([LayerCost("a", 10, {4: 5.0, 8: 0.0}), LayerCost("b", 30, {4: 6.0, 8: 0.0})], 5.0)
    {'a': 8, 'b': 4}
    """
    total = sum(cost.weights for cost in costs)
    least = sum(cost.weights * min(cost.errors) for cost in costs) / total
    if average_bits < least:
        raise UsageError(f"avg_bits={average_bits}: the fewest possible are {least:.3f}; ask for at least that")
    offered = sorted({bits for cost in costs for bits in cost.errors})
    errors = np.array([[cost.errors.get(bits, np.inf) for bits in offered] for cost in costs])
    sizes = np.array([[float(cost.weights * bits) for bits in offered] for cost in costs])
    try:
        # a hair of room, for what `average_bits` is as a double
        chosen = least_error(errors, sizes, average_bits * total * (1 + 1e-12))
    except ValueError as error:
        raise QuantrackError(f"avg_bits={average_bits}: no plan found ({error})") from error
    return {cost.name: offered[place] for cost, place in zip(costs, chosen, strict=True)}
