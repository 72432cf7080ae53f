"""Choices near a decision: measuring them alone finds the plan that measuring everything finds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from search.boundary import near_decision
from search.problem import Problem, Row
from search.solve import solve


def problem_of(costs: np.ndarray, usage: np.ndarray, limit: int, direction: str = "min") -> Problem:
    return Problem(costs.copy(), (Row("bytes", "<=", usage.copy(), limit),), direction)  # type: ignore[arg-type]


def random_costs(seed: int, groups: int = 25, schemes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall by about 4 per bit, at 2 to 7 bits of layers of several sizes."""
    generator = np.random.default_rng(seed)
    bits = np.arange(2, 2 + schemes)
    sizes = generator.integers(1, 5, (groups, 1)) * 64
    level = np.exp(generator.normal(0, 1, (groups, 1)))
    return level * sizes * 4.0**-bits * np.exp(generator.normal(0, 0.1, (groups, schemes))), sizes * bits


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tightness", [0.3, 0.6])
def test_measuring_near_choices_alone_finds_the_best_plan(seed: int, tightness: float) -> None:
    costs, usage = random_costs(seed)
    low_total, high_total = int(usage.min(axis=1).sum()), int(usage.max(axis=1).sum())
    limit = int(low_total + tightness * (high_total - low_total))
    spread = 1.25
    likely = costs * np.exp(np.random.default_rng(seed + 100).uniform(-1, 1, costs.shape) * np.log(spread))
    measured = np.zeros(costs.shape, dtype=bool)
    for _ in range(10):
        values = np.where(measured, costs, likely)
        low, high = (np.where(measured, costs, likely * factor) for factor in (1 / spread, spread))
        problem = problem_of(values, usage, limit)
        chosen = solve(problem).choice
        assert chosen is not None
        near = near_decision(problem, low, high, chosen)
        if not (near & ~measured).any():
            break
        measured |= near
    best = solve(problem_of(costs, usage, limit))
    assert problem_of(costs, usage, limit).objective(chosen) == pytest.approx(best.objective, rel=1e-9)
    assert measured.mean() < 0.75


def test_without_uncertainty_only_close_calls_are_near() -> None:
    costs, usage = random_costs(0)
    problem = problem_of(costs, usage, int(usage.mean(axis=1).sum()))
    chosen = solve(problem).choice
    assert chosen is not None
    near = near_decision(problem, costs, costs, chosen)
    assert near[np.arange(len(chosen)), chosen].all()
    assert near.mean() < 0.35
    wide = near_decision(problem, costs / 100, costs * 100, chosen)
    assert (wide | ~near).all()
    assert wide.mean() > 0.9


def test_without_limits_and_when_maximizing() -> None:
    costs = np.array([[1.0, 2.0, 8.0], [5.0, 3.0, np.nan]])
    free = Problem(costs.copy())
    assert near_decision(free, costs * 0.5, costs * 1.5, (0, 1)).tolist() == [
        [True, True, False],
        [True, True, False],
    ]
    assert near_decision(free, costs, costs, (0, 1)).tolist() == [[True, False, False], [False, True, False]]
    most = Problem(costs.copy(), direction="max")
    assert near_decision(most, costs, costs, (2, 0)).tolist() == [[False, False, True], [True, False, False]]


def optima(problem: Problem, low: np.ndarray, high: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(groups, schemes): the choices of best plans, among all that keep the limits, under scores drawn from
    the ends of their intervals.
    """
    generator, every = np.random.default_rng(seed), np.arange(len(low))
    plans = np.array(list(product(range(low.shape[1]), repeat=len(low))))
    kept = [row.usage[every, plans].sum(axis=1) <= row.limit for row in problem.rows]
    plans, found = plans[np.logical_and.reduce(kept)], np.zeros(low.shape, dtype=bool)
    for _ in range(draws):
        drawn = np.where(generator.random(low.shape) < 0.5, low, high)
        found[every, plans[drawn[every, plans].sum(axis=1).argmin()]] = True
    return found


def test_near_choices_are_those_of_all_plans_under_two_limits() -> None:
    """Each limit is on every other group: without the prices of both, most choices would count as near."""
    reached = missed = near_cells = cells = 0
    for seed in range(20):
        costs, usage = random_costs(seed, groups=6, schemes=4)
        first = usage * (np.arange(6) % 2)[:, None]
        rows = tuple(
            Row(name, "<=", own, int((1 - share) * own.min(axis=1).sum() + share * own.max(axis=1).sum()))
            for name, own, share in (("bytes", first, 0.5), ("bits", usage - first, 0.3))
        )
        problem, low, high = Problem(costs.copy(), rows), costs / 1.1, costs * 1.1
        chosen = solve(problem).choice
        assert chosen is not None
        near, best = near_decision(problem, low, high, chosen), optima(problem, low, high, 100, seed)
        reached, missed = reached + best.sum(), missed + (best & ~near).sum()
        near_cells, cells = near_cells + near.sum(), cells + near.size
    assert missed < 0.05 * reached
    assert near_cells < 0.6 * cells
