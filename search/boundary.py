"""Choices near a decision: those that a different score within its uncertainty would put into the plan."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from search.core import Core, core_of, drop_loose_rows, shrink_by_limits
from search.deadline import Deadline
from search.dual import solve_dual
from search.problem import Choice, Problem

NEIGHBORS = (0.85, 1.0, 1.18)
"""Prices of the limits are taken at these factors too: budgets a little larger and smaller."""

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def near_decision(
    problem: Problem,
    low: Floats,
    high: Floats,
    choice: Choice,
    seconds: float = 10.0,
) -> Mask:
    """Shape (groups, schemes): the plan's own choices, and those that may beat their group's best.

    Each cell's cost lies between `low` and `high`; `problem` holds the likely costs, `choice` its optimum. A
    cell is near if, at the limits' prices (the multipliers of the Lagrangian dual, and 0.85 and 1.18 times
    them), its least cost is below the most that its group's best cell may cost, or above by no more than
    what the optimum itself lies above the prices' bound.
    """
    sign = 1.0 if problem.direction == "min" else -1.0
    least, most = (sign * low, sign * high) if sign > 0 else (sign * high, sign * low)
    offered = problem.offered
    prices, gap = _prices(problem, choice, Deadline.after(seconds))
    near = np.zeros(offered.shape, dtype=bool)
    for factor in NEIGHBORS if prices.any() else (1.0,):
        optimistic = np.where(offered, least + factor * prices, np.inf)
        pessimistic = np.where(offered, most + factor * prices, np.inf)
        near |= optimistic <= pessimistic.min(axis=1, keepdims=True) + gap
    near[np.arange(len(choice)), choice] = True
    return near & offered


def _prices(problem: Problem, choice: Choice, deadline: Deadline) -> tuple[Floats, float]:
    """What each cell's usage costs at the dual's multipliers, and the largest loss of a chosen cell there."""
    core = core_of(problem)
    shrink_by_limits(core)
    drop_loose_rows(core)
    if not core.usage:
        return np.zeros(problem.costs.shape), 0.0
    multipliers = solve_dual(core, deadline).multipliers
    prices = _priced(core, multipliers)
    sign = 1.0 if problem.direction == "min" else -1.0
    total = np.where(problem.offered, sign * np.nan_to_num(problem.costs) + prices, np.inf)
    above = total[np.arange(len(choice)), choice] - total.min(axis=1)
    return prices, float(above.max())


def _priced(core: Core, multipliers: tuple[Fraction, ...]) -> Floats:
    prices = np.zeros(core.cost.shape)
    for multiplier, usage in zip(multipliers, core.usage, strict=True):
        above = (usage - usage.min(axis=1, keepdims=True)).astype(np.float64)
        prices += float(multiplier * core.unit) * above
    return prices
