from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from search.problem import Problem, Row
from search.random_plans import SWAPS, near_plans, random_plans
from search.solve import solve


@pytest.mark.parametrize("rows", [1, 2])
def test_plans_are_different_feasible_and_full(knapsack: Callable[..., Problem], rows: int) -> None:
    problem = knapsack(12, 4, rows)
    plans = random_plans(problem, 30, seed=1)
    assert len(set(plans)) == 30
    for plan in plans:
        assert problem.feasible(plan)
        for group, scheme in enumerate(plan):
            raised = [
                c
                for c in range(4)
                if all(row.usage[group, c] > row.usage[group, scheme] for row in problem.rows)
            ]
            assert not any(problem.feasible((*plan[:group], c, *plan[group + 1 :])) for c in raised)


def test_the_seed_decides(knapsack: Callable[..., Problem]) -> None:
    problem = knapsack(12, 4)
    assert random_plans(problem, 5, seed=1) == random_plans(problem, 5, seed=1)
    assert random_plans(problem, 5, seed=1) != random_plans(problem, 5, seed=2)


def test_fewer_where_there_are_no_more() -> None:
    usage = np.array([[1, 2], [1, 2]])
    assert set(random_plans(Problem(np.zeros((2, 2)), (Row("x", "<=", usage, 3),)), 9)) == {(0, 1), (1, 0)}
    assert random_plans(Problem(np.zeros((2, 2)), (Row("x", "<=", usage, 1),)), 9) == ()


def test_both_sides_of_a_band_hold(knapsack: Callable[..., Problem]) -> None:
    base = knapsack(10, 4)
    upper = base.rows[0]
    band = Problem(base.costs, (upper, Row("r0", ">=", upper.usage, int(upper.limit * 0.95))))
    plans = random_plans(band, 5)
    assert plans
    assert all(band.feasible(plan) for plan in plans)


def test_near_plans_are_feasible_full_and_few_changes_away(knapsack: Callable[..., Problem]) -> None:
    problem = knapsack(40, 4)
    start = solve(problem).choice
    assert start is not None
    plans = near_plans(problem, start, 20, seed=1)
    assert len(set(plans)) == 20
    assert start not in plans
    changes = [sum(a != b for a, b in zip(plan, start, strict=True)) for plan in plans]
    usage, limit = problem.rows[0].usage, problem.rows[0].limit
    for plan in plans:
        left = limit - sum(int(usage[g, c]) for g, c in enumerate(plan))
        assert left >= 0
        assert not any(
            0 < usage[g, c] - usage[g, plan[g]] <= left for g in range(len(plan)) for c in range(4)
        )
    away = [sum(a != b for a, b in zip(plan, start, strict=True)) for plan in random_plans(problem, 20)]
    assert np.mean(changes) < 2 * SWAPS + 3 < np.mean(away)
    assert near_plans(problem, start, 5, seed=2) == near_plans(problem, start, 5, seed=2)


def test_no_plan_is_near_the_only_one() -> None:
    problem = Problem(np.zeros((2, 2)), (Row("x", "<=", np.array([[1, 2], [1, 2]]), 2),))
    assert near_plans(problem, (0, 0), 5) == ()
