"""The plan of bits under a budget, against trying everything."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from quantrack.errors import QuantrackError, UsageError
from quantrack.quantization.bit_plan import BitPlan, LayerCost, read_plan, solve_bits


def test_the_plan_is_the_best_of_all() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        costs = [
            LayerCost(str(index), int(random.integers(1, 100)), {4: random.random(), 6: random.random(), 8: 0.0})
            for index in range(6)
        ]
        budget = float(random.uniform(4, 8))
        total = sum(cost.weights for cost in costs)
        affordable = [
            sum(cost.errors[bits] for cost, bits in zip(costs, chosen, strict=True))
            for chosen in itertools.product((4, 6, 8), repeat=len(costs))
            if sum(cost.weights * bits for cost, bits in zip(costs, chosen, strict=True)) <= budget * total
        ]
        bits = solve_bits(costs, budget)
        assert sum(cost.errors[bits[cost.name]] for cost in costs) == pytest.approx(min(affordable), abs=1e-6)
        assert sum(cost.weights * bits[cost.name] for cost in costs) <= budget * total + 1e-6


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(UsageError, match=r"avg_bits=3.5: the fewest possible are 4.000"):
        solve_bits([LayerCost("a", 1, {4: 1.0, 8: 0.0})], 3.5)


def test_a_plan_reads_back(tmp_path: Path) -> None:
    plan = BitPlan("digest", {"model.0.conv": 8, "model.1.conv": 4, "model.2.conv": (3, 4, 8)})
    assert [plan.average(name) for name in plan.bits] == [8, 4, 5]
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a bit plan"),
        ("[]", "not a bit plan"),
        ('{"bits": {}}', "not a bit plan"),
        ('{"model_digest": "x", "bits": {"a": 16}}', "bits must be whole numbers from 2 to 8"),
        ('{"model_digest": "x", "bits": {"a": [4, 16]}}', "bits must be whole numbers from 2 to 8"),
        ('{"model_digest": "x", "bits": {"a": []}}', "bits must be whole numbers from 2 to 8"),
        ('{"model_digest": "x", "bits": {"a": true}}', "bits must be whole numbers from 2 to 8"),
    ],
)
def test_a_broken_plan_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(QuantrackError, match=said):
        read_plan(path)
    with pytest.raises(QuantrackError, match="cannot be read"):
        read_plan(tmp_path / "absent.json")


def test_a_plan_for_another_model_is_refused() -> None:
    plan = BitPlan("one", {"a": 4})
    with pytest.raises(QuantrackError, match="made for model one, not two"):
        plan.require_fits("two", ["a"])
    with pytest.raises(QuantrackError, match="b is not in both plan and model"):
        plan.require_fits("one", ["a", "b"])
