from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from search.problem import Problem, Row
from search.random_plans import random_plans


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
