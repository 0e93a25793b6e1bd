"""Step: plan the bits of weights under a budget, by what each layer or output channel costs (`sensitivity`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantrack.errors import UsageError
from quantrack.quantization.bit_plan import OFFERED_BITS, PLANNED_BY, require_choice
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import quantized_layers
from quantrack.quantization.sensitivity import LayerSensitivity, SensitivityMeasurement, cached_sensitivity, make_plan

FEWEST = 4  # of bits by role


@dataclass(frozen=True)
class PlanBits:
    """The plan of least estimated error with at most `average` bits a weight, chosen from `bits`.

    It decides in the place of roles, so it comes before the quantizers. `by` is `layer`, or `channel` for bits of each
    output channel. Without an `average` it is `average_by_role`. Weights of 8 bits need no plan: nothing is done then.
    Errors are those that `gptq` leaves with the same `weigh_all`.
    """

    average: float | None = 4.5
    bits: tuple[int, ...] = OFFERED_BITS
    by: str = "channel"
    weigh_all: bool = False

    def __post_init__(self) -> None:
        require_choice(self.bits)
        low, high = min(self.bits), max(self.bits)
        if self.average is None and (FEWEST not in self.bits or high == FEWEST):
            raise UsageError(f"bits={list(self.bits)}: as many as by role are some of {FEWEST} and some of more")
        if self.average is not None and not low <= self.average <= high:
            raise UsageError(f"average={self.average}: must lie between {low} and {high}")
        if self.by not in PLANNED_BY:
            raise UsageError(f"by={self.by}: unknown; use {' or '.join(PLANNED_BY)}")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        if job.scheme.weight_bits == 8:
            return {}
        if quantized_layers(job.model):
            raise UsageError("plan_bits: quantizers that have their bits are there already; make it the first step")
        rows = cached_sensitivity(job, SensitivityMeasurement(bits=self.bits, weigh_all=self.weigh_all))
        average = average_by_role(rows, max(self.bits)) if self.average is None else self.average
        job.plan = make_plan(job, rows, average, self.by)
        return {"planned_error": sum(row.planned_error(job.plan.bits[row.name]) for row in rows)}


FOR_INT4 = PlanBits(average=None, bits=(4, 7), by="layer")
"""For the smallest file: 4 and 7 bits waste nothing of INT4 and INT8; the file is as large as with bits by role."""


def average_by_role(rows: Sequence[LayerSensitivity], most: int) -> float:
    """The average of our bits by role, with `most` in the place of 8: a plan of 4 and these makes a file as large."""
    kept = sum(row.weights for row in rows if row.role in InsertQuantizers.roles_at_8_bits)
    return FEWEST + (most - FEWEST) * kept / sum(row.weights for row in rows)
