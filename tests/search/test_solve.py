from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from search.problem import Problem, ProblemError, Row, Status
from search.solve import least_budget, solve

CASES = 600


def test_random_problems_of_every_kind_equal_brute_force(random_case: Callable[[int], Problem]) -> None:
    statuses = set()
    for seed in range(CASES):
        problem = random_case(seed)
        truth, found = solve(problem, solver="brute"), solve(problem)
        assert found.status == truth.status, seed
        statuses.add((truth.status, problem.direction))
        if truth.objective is not None:
            assert found.objective == pytest.approx(truth.objective, rel=1e-9, abs=1e-21), seed
            assert found.choice is not None
            assert problem.feasible(found.choice)
    assert len(statuses) == 4


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_labels_and_highs_agree_on_larger_problems(
    knapsack: Callable[..., Problem], rows: int, seed: int
) -> None:
    problem = knapsack(40, 6, rows, seed=seed)
    first, second = solve(problem), solve(problem, solver="highs")
    assert first.status == second.status == Status.OPTIMAL
    assert first.objective == pytest.approx(second.objective, rel=1e-9)


def test_a_gap_of_zero_is_proven(knapsack: Callable[..., Problem]) -> None:
    solution = solve(knapsack(60, 8, seed=3), gap=0.0)
    assert solution.status is Status.OPTIMAL
    assert solution.gap == 0.0
    assert solution.bound == solution.objective


def test_ten_thousand_groups_are_proven(knapsack: Callable[..., Problem]) -> None:
    solution = solve(knapsack(10_000, 12))
    assert solution.status is Status.OPTIMAL
    assert solution.gap is not None
    assert solution.gap <= 1e-9


@pytest.mark.parametrize("solver", ["lagrangian", "highs"])
def test_one_unit_below_a_tempting_total(solver: str) -> None:
    usage = np.array([[10**13 + i, 2 * 10**13 + 3 * i + 1] for i in range(5)])
    tempting = (1, 1, 1, 1, 1)
    total = sum(int(row[1]) for row in usage)
    costs = np.array([[1.0 + i * 1e-6, 0.0] for i in range(5)])
    assert solve(Problem(costs, (Row("bytes", "<=", usage, total),)), solver=solver).choice == tempting
    below = solve(Problem(costs, (Row("bytes", "<=", usage, total - 1),)), solver=solver)
    assert below.status is Status.OPTIMAL
    assert below.choice == (0, 1, 1, 1, 1)


@pytest.mark.parametrize("solver", ["lagrangian", "highs"])
def test_tiny_losses_are_not_swallowed(solver: str) -> None:
    costs = np.array([[3e-12, 1e-12], [2e-12, 1e-12], [1e12, 1e-12]])
    usage = np.array([[1, 2], [1, 2], [1, 2]])
    solution = solve(Problem(costs, (Row("x", "<=", usage, 5),)), solver=solver)
    assert solution.choice == (1, 0, 1)
    assert solution.objective == pytest.approx(4e-12)


def test_maximizing_turns_the_bound_around(knapsack: Callable[..., Problem]) -> None:
    base = knapsack(30, 5, 2)
    largest = Problem(-base.costs, base.rows, "max")
    smallest, found = solve(base), solve(largest)
    assert found.objective == pytest.approx(-smallest.objective)  # type: ignore[operator]
    assert found.bound is not None
    assert found.objective is not None
    assert found.bound >= found.objective


def test_infeasible_names_the_least_budget_under_the_other_limits() -> None:
    size, time_ = np.array([[1, 3], [1, 3]]), np.array([[9, 4], [9, 5]])
    rows = (Row("bytes", "<=", size, 4, Fraction(1, 2)), Row("latency_ns", "<=", time_, 10))
    solution = solve(Problem(np.zeros((2, 2)), rows))
    assert solution.status is Status.INFEASIBLE
    assert dict(solution.least_budget) == {"bytes": 3, "latency_ns": 13}
    assert "together" in solution.reason


def test_least_budget_falls_back_to_each_resource_alone() -> None:
    size = np.array([[2, 3]])
    problem = Problem(
        np.zeros((1, 2)), (Row("a", "<=", size, 1), Row("b", ">=", size, 9), Row("b", "<=", size, 3))
    )
    assert dict(least_budget(problem)) == {"a": 2, "b": 3, "b<=": 2}
    assert "limit on a, b" in solve(problem).reason


def test_a_group_without_schemes_is_infeasible_and_named() -> None:
    solution = solve(Problem(np.array([[1.0], [np.nan]]), (), groups=("q+k", "o")))
    assert solution.status is Status.INFEASIBLE
    assert "no scheme is left for o" in solution.reason
    assert dict(solution.least_budget) == {}


def _subset_sum(groups: int) -> Problem:
    """A band so narrow that no heuristic hits it and exhausting it takes hours."""
    usage = np.random.default_rng(1).integers(10**13, 10**14, (groups, 3))
    total = int(usage[:, 1].sum())
    return Problem(usage / 1e14, (Row("x", "<=", usage, total), Row("x", ">=", usage, total)))


def test_the_time_limit_ends_a_hopeless_search() -> None:
    started = time.monotonic()
    solution = solve(_subset_sum(45), time_limit=0.5)
    assert time.monotonic() - started < 20
    assert solution.status in (Status.UNKNOWN, Status.FEASIBLE)


def test_at_the_time_limit_the_best_known_plan_comes_back(knapsack: Callable[..., Problem]) -> None:
    solution = solve(knapsack(2000, 12, 2), time_limit=1e-6)
    assert solution.status is Status.FEASIBLE
    assert solution.gap is not None
    assert 1e-9 < solution.gap < 0.05


def test_misuse_is_refused() -> None:
    problem = Problem(np.zeros((1, 1)))
    with pytest.raises(ProblemError, match="must be one of auto, lagrangian"):
        solve(problem, solver="magic")
    for gap in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ProblemError, match="gap must be"):
            solve(problem, gap=gap)
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(ProblemError, match="time limit must be"):
            solve(problem, time_limit=seconds)
    with pytest.raises(ProblemError, match="at most 5000000 choices"):
        solve(Problem(np.zeros((40, 2))), solver="brute")
