from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest

from search.prices import shadow_prices
from search.problem import Problem, Row
from search.solve import solve


def _hull(problem: Problem, row: Row) -> list[tuple[float, float]]:
    """Corners of the lower convex hull of every plan's (usage, cost), cost falling, by enumeration."""
    sign = 1 if problem.direction == "min" else -1
    every = product(range(problem.costs.shape[1]), repeat=len(problem.costs))
    points = sorted((float(row.total(c) * row.unit), sign * problem.objective(c)) for c in every)
    hull: list[tuple[float, float]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1] - 1e-12:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("seed", range(6))
def test_the_price_of_one_limit_is_the_slope_of_the_frontier_there(seed: int, direction: str) -> None:
    rng = np.random.default_rng(seed)
    sign = 1 if direction == "min" else -1
    costs = sign * np.sort(rng.uniform(0, 1, (5, 3)), axis=1)[:, ::-1]
    usage = np.sort(rng.integers(1, 50, (5, 3)), axis=1)
    limit = int(usage.min(1).sum() + rng.uniform(0.2, 0.8) * (usage.max(1) - usage.min(1)).sum())
    row = Row("bits", "<=", usage, limit, Fraction(1, 8))
    problem = Problem(costs, (row,), direction)
    (price,) = shadow_prices(problem).values()
    hull = _hull(problem, row)
    beside = [-_slope(a, b) for a, b in pairwise(hull) if a[0] <= limit / 8 <= b[0]]
    assert min(beside) * (1 - 1e-6) <= price <= max(beside) * (1 + 1e-6)


def test_prices_of_several_limits_give_the_best_bound(knapsack: Callable[..., Problem]) -> None:
    problem = knapsack(6, 3, 2, seed=1)
    prices = list(shadow_prices(problem).values())

    def bound(point: list[float]) -> float:
        priced = problem.costs + sum(
            value * row.usage for value, row in zip(point, problem.rows, strict=True)
        )
        return float(priced.min(axis=1).sum()) - sum(
            value * row.limit for value, row in zip(point, problem.rows, strict=True)
        )

    best = bound(prices)
    assert best <= solve(problem).objective
    rng = np.random.default_rng(0)
    tries = [
        [value * factor for value, factor in zip(prices, rng.uniform(0, 3, 2), strict=True)]
        for _ in range(500)
    ]
    assert all(bound(point) <= best * (1 + 1e-9) for point in tries)
    assert min(prices) > 0


def test_a_limit_that_does_not_bind_is_free_and_at_least_is_paid_for_too() -> None:
    usage = np.array([[1, 4], [1, 4]])
    problem = Problem(
        np.array([[0.0, 1.0], [0.0, 3.0]]),
        (Row("bytes", ">=", usage, 4), Row("bytes", "<=", usage, 100)),
    )
    solution = solve(problem, prices=True)
    assert dict(solution.prices) == {"bytes": pytest.approx(1 / 3), "bytes<=": 0.0}
    assert not solve(problem).prices
    assert not solve(Problem(np.array([[1.0]])), prices=True).prices
