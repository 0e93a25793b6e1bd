"""The knapsack behind bit plans, against integer programming over all choices and against dynamic programming."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantrack.quantization import knapsack
from quantrack.quantization.knapsack import EXACT_ITEMS, GAP, Choice, Matrix, least_error


def instance(items: int, seed: int) -> tuple[Matrix, Matrix, int]:
    """Errors that fall as bits rise, some of them missing, whole sizes, and a budget between the extremes."""
    random = np.random.default_rng(seed)
    errors = np.sort(random.random((items, 4)) ** 3, axis=1)[:, ::-1].copy()
    errors[random.random((items, 4)) < 0.1] = np.inf
    errors[:, 0] = np.where(np.isfinite(errors[:, 0]), errors[:, 0], 1.0)
    sizes = random.integers(1, 40, (items, 1)) * np.array([[3.0, 4.0, 5.0, 8.0]])
    return errors, sizes, int(sizes[:, 0].sum() + random.uniform(0, 1) * (sizes[:, 3] - sizes[:, 0]).sum())


def least_by_dynamic_programming(errors: Matrix, sizes: Matrix, budget: int) -> float:
    """The least total error, trying every size."""
    best = np.zeros(budget + 1)
    for error, size in zip(errors, sizes.astype(int), strict=True):
        tried = np.full((len(error), budget + 1), np.inf)
        for place, step in enumerate(size):
            if step <= budget:
                tried[place, step:] = best[: budget + 1 - step] + error[place]
        best = tried.min(axis=0)
    return float(best[budget])


def totals(errors: Matrix, sizes: Matrix, choice: Choice) -> tuple[float, float]:
    items = np.arange(len(choice))
    return float(errors[items, choice].sum()), float(sizes[items, choice].sum())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("items", [1, 7, EXACT_ITEMS])
def test_few_items_are_solved_exactly(items: int, seed: int) -> None:
    errors, sizes, budget = instance(items, seed)
    error, size = totals(errors, sizes, least_error(errors, sizes, budget))
    assert size <= budget
    assert error == pytest.approx(least_by_dynamic_programming(errors, sizes, budget), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_many_items_come_within_the_gap(seed: int) -> None:
    errors, sizes, budget = instance(1500, seed)
    error, size = totals(errors, sizes, least_error(errors, sizes, budget))
    least = least_by_dynamic_programming(errors, sizes, budget)
    assert size <= budget
    assert least - 1e-9 <= error <= least * (1 + GAP)


@pytest.mark.parametrize(("budget", "best"), [(1e9, True), (0.0, False)])
def test_the_ends(budget: float, best: bool) -> None:
    errors, sizes, _ = instance(50, 0)
    least = float(sizes.min(axis=1).sum())
    choice = least_error(errors, sizes, max(budget, least))
    expected = errors.min(axis=1) if best else errors[:, 0]
    np.testing.assert_array_equal(errors[np.arange(50), choice], expected)


def test_standard_output_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, sizes, budget = instance(30, 0)
    shown = least_error(errors, sizes, budget)
    monkeypatch.setattr("sys.stdout", None)
    assert least_error(errors, sizes, budget).tolist() == shown.tolist()


def test_equal_items_and_no_error_at_all() -> None:
    sizes = np.tile([4.0, 8.0], (300, 1))
    same = least_error(np.tile([1.0, 0.0], (300, 1)), sizes, 4.5 * 300)
    assert same.sum() == 37  # half a bit of 300 items pays for four bits of so many
    assert least_error(np.zeros((300, 2)), sizes, 4.5 * 300).sum() == 0


def test_only_choices_that_matter_are_programmed(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, sizes, budget = instance(EXACT_ITEMS, 3)
    offered: list[int] = []
    solve = knapsack._solved

    def counted(errors: Matrix, sizes: Matrix, budget: float, known: Choice, gap: float, room: float) -> Choice:
        offered.append(int(np.isfinite(errors).sum()))
        return solve(errors, sizes, budget, known, gap, room)

    monkeypatch.setattr(knapsack, "_solved", counted)
    least_error(errors, sizes, budget)
    assert offered
    assert all(count < errors.size / 4 for count in offered)


@pytest.mark.parametrize("seed", range(8))
def test_large_sizes_keep_to_the_budget_exactly(seed: int) -> None:
    errors, sizes, _ = instance(EXACT_ITEMS, seed)
    sizes = sizes * 100_003 + np.arange(EXACT_ITEMS)[:, None] * np.array([[0, 1, 2, 3]])  # no common factor
    budget = float(np.floor(sizes.mean(axis=1).sum()))
    assert totals(errors, sizes, least_error(errors, sizes, budget))[1] <= budget


def test_what_is_no_instance_is_refused() -> None:
    errors, sizes = np.array([[1.0, 0.0], [np.inf, 0.0]]), np.array([[4.0, 8.0], [4.0, 8.0]])
    assert least_error(errors, sizes, 12).tolist() == [0, 1]
    with pytest.raises(ValueError, match="not even the smallest choices fit"):
        least_error(errors, sizes, 11)
    for broken in (np.array([[np.nan, 0.0], [1.0, 0.0]]), -errors[:1].repeat(2, axis=0)):
        with pytest.raises(ValueError, match="errors must not be negative"):
            least_error(broken, sizes, 12)
    with pytest.raises(ValueError, match="sizes positive whole numbers"):
        least_error(errors, sizes / 3, 12)


def test_the_solver_prints_nothing(tmp_path: Path) -> None:
    """Into a file, where C keeps what is printed until the end; another process, as Python's tests take its output."""
    program = f"""
import ctypes, runpy
from unittest.mock import patch
from quantrack.quantization import knapsack
tests = runpy.run_path({__file__!r})
print("before", flush=True)
solve = knapsack.milp
def loud(*arguments, **options):
    ctypes.CDLL(None).puts(b"stray")
    return solve(*arguments, **options)
with patch.object(knapsack, "milp", loud):
    knapsack.least_error(*tests["instance"](tests["EXACT_ITEMS"], 3))
ctypes.CDLL(None).puts(b"after")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "out.txt").open("w") as out:
        subprocess.run([sys.executable, "-c", program], check=True, stdout=out, env=environment)
    assert (tmp_path / "out.txt").read_text() == "before\nafter\n"
