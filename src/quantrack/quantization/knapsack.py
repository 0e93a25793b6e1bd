"""The multiple-choice knapsack: one choice of each item, of least total error, whose sizes fit a budget.

Integer programming solves it, and is given only the choices that matter: under Lagrange's relaxation of the budget
(Fisher, "The Lagrangian Relaxation Method for Solving Integer Programming Problems", Management Science 27, 1981)
nearly all of thousands are known to cost more than a solution at hand, and so are in no best one. The same relaxation
bounds how far from the best a solution can be.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

Matrix = NDArray[np.float64]
Choice = NDArray[np.intp]
EXACT_ITEMS = 200  # of more, the last thousandth of a percent can take minutes
GAP = 1e-5  # of the least error, for more items


def least_error(errors: Matrix, sizes: Matrix, budget: float) -> Choice:
    """The choice [items] of least total error whose sizes come to at most `budget`, proven.

    Of more than `EXACT_ITEMS` items its error may be above the least by `GAP` of it. `errors`, not negative, and
    `sizes`, positive whole numbers, are [items, choices]; an error of infinity marks what an item does not offer.

    Raises:
        ValueError: errors or sizes are none, not even the smallest choices fit, or the solver failed.

    >>> least_error(np.array([[5.0, 0.0], [6.0, 0.0]]), np.array([[4.0, 8.0], [12.0, 24.0]]), 20.0).tolist()
    [1, 0]
    """
    if not ((errors >= 0).all() and (sizes > 0).all() and (sizes == np.round(sizes)).all()):
        raise ValueError("errors must not be negative, sizes positive whole numbers")
    if not np.where(np.isfinite(errors), sizes, np.inf).min(axis=1).sum() <= budget:
        raise ValueError("not even the smallest choices fit the budget")
    price = _price(errors, sizes, budget)
    chosen = _filled(_cheapest(errors, sizes, price), errors, sizes, budget)
    priced = errors + price * sizes
    least = priced.min(axis=1, keepdims=True)
    bound = float(least.sum() - price * budget)  # no choice that fits has less error
    gap = 0.0 if len(errors) <= EXACT_ITEMS else GAP * max(bound, 0.0)
    room = max(0.0, _total(errors, chosen) - bound)
    possible = priced - least <= room * (1 + 1e-9) + 1e-12 * float(errors[np.isfinite(errors)].max(initial=0.0))
    unsure = possible.sum(axis=1) > 1
    if room > gap and unsure.any():
        left = budget - _total(sizes[~unsure], chosen[~unsure])
        offered = np.where(possible, errors, np.inf)[unsure]
        solved = _solved(offered, sizes[unsure], left, chosen[unsure], gap, room)
        if _total(offered, solved) < _total(offered, chosen[unsure]):
            chosen[unsure] = solved
    return chosen


def _price(errors: Matrix, sizes: Matrix, budget: float) -> float:
    """The error that a unit of size must save, at which the cheapest choices fit and the bound is highest."""
    if _total(sizes, _cheapest(errors, sizes, 0.0)) <= budget:
        return 0.0
    low, high = 0.0, 1.0
    while _total(sizes, _cheapest(errors, sizes, high)) > budget:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if _total(sizes, _cheapest(errors, sizes, middle)) > budget:
            low = middle
        else:
            high = middle
    return high


def _cheapest(errors: Matrix, sizes: Matrix, price: float) -> Choice:
    """Each item's choice of least error and price together, the smallest of equal ones."""
    priced = errors + price * sizes
    best = priced == priced.min(axis=1, keepdims=True)
    smallest: Choice = np.where(best, sizes, np.inf).argmin(axis=1)
    return smallest


def _filled(choice: Choice, errors: Matrix, sizes: Matrix, budget: float) -> Choice:
    """The choice, and what room it leaves used by the steps that save most and fit."""
    filled = choice.copy()
    items = np.arange(len(choice))
    saved = errors[items, choice][:, None] - errors
    room = budget - _total(sizes, choice)
    for step in np.argsort(-saved, axis=None):
        item, better = divmod(int(step), saved.shape[1])
        if saved[item, better] <= 0:
            break
        more = float(sizes[item, better] - sizes[item, filled[item]])
        if more <= room and errors[item, better] < errors[item, filled[item]]:
            filled[item] = better
            room -= more
    return filled


def _total(values: Matrix, choice: Choice) -> float:
    return float(values[np.arange(len(choice)), choice].sum())


def _solved(errors: Matrix, sizes: Matrix, budget: float, known: Choice, gap: float, room: float) -> Choice:
    """By integer programming, over the choices of finite error; at most `gap` above the least, or above `known`.

    `known` fits, and the least error is at most `room` below its own: the unit in which the solver counts.
    """
    offered = np.isfinite(errors)
    owners, places = np.nonzero(offered)
    one_each = csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))))
    apart = errors - errors.min(axis=1, keepdims=True)
    if _total(apart, known) == 0:
        return known
    smallest = np.where(offered, sizes, np.inf).min(axis=1, keepdims=True)
    steps = (sizes - smallest)[offered]
    unit = max(1.0, float(np.gcd.reduce(steps.astype(np.int64))))  # the smaller the numbers, the less tolerance takes
    most = np.floor((budget - smallest.sum()) / unit + 1e-9)
    with _no_stray_lines():
        solution: OptimizeResult = milp(
            apart[offered] / room,
            integrality=np.ones(len(owners), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(steps / unit, ub=most)],
            options={"mip_rel_gap": gap / _total(apart, known)},
        )
    if not solution.success:
        raise ValueError(solution.message)
    taken = solution.x > 0.5
    if not (np.bincount(owners[taken], minlength=len(errors)) == 1).all() or (steps[taken] / unit).sum() > most:
        raise ValueError("the solver's choices do not fit")
    choice = np.empty(len(errors), dtype=np.intp)
    choice[owners[taken]] = places[taken]
    return choice


@contextmanager
def _no_stray_lines() -> Iterator[None]:
    """HiGHS prints a line for each solution that it repairs, asked or not, past Python's own standard output."""
    if sys.stdout is None:  # it is closed, and its number may be that of another file by now
        yield
        return
    c_library = ctypes.CDLL(None)
    sys.stdout.flush()
    c_library.fflush(None)  # what was written before is shown
    own = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        c_library.fflush(None)
        os.dup2(own, 1)
        os.close(own)
