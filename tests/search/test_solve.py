from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from search.backends import pulp
from search.problem import Problem, ProblemError, Row, Status
from search.solve import least_budget, solve

CASES = 300
MANY = 5000


def test_random_problems_of_every_kind_equal_brute_force(random_case: Callable[[int], Problem]) -> None:
    _agree(random_case, range(CASES))


@pytest.mark.slow
def test_thousands_of_random_problems_equal_brute_force(random_case: Callable[[int], Problem]) -> None:
    _agree(random_case, range(CASES, MANY))


def _agree(random_case: Callable[[int], Problem], seeds: range) -> None:
    statuses = set()
    for seed in seeds:
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_plain_program_agrees(knapsack: Callable[..., Problem], rows: int, seed: int) -> None:
    problem = knapsack(40, 6, rows, seed=seed)
    assert solve(problem).objective == pytest.approx(_plain_program(problem), rel=1e-9)


def _plain_program(problem: Problem) -> float:
    """The least objective by PuLP and HiGHS: a binary per cell, no presolve of ours."""
    program = pulp.LpProblem("plain", pulp.LpMinimize)
    cells = [
        [program.add_variable(f"x_{g}_{c}", 0, 1, "Integer") for c in range(len(row))]
        for g, row in enumerate(problem.costs)
    ]
    pairs = [(cell, g, c) for g, row in enumerate(cells) for c, cell in enumerate(row)]
    program += pulp.lpSum([float(problem.costs[g, c]) * cell for cell, g, c in pairs])
    for row in cells:
        program += pulp.lpSum(row) == 1
    for limit in problem.rows:
        program += pulp.lpSum([float(limit.usage[g, c]) * cell for cell, g, c in pairs]) <= float(limit.limit)
    program.solve(pulp.HiGHS(msg=False, gapRel=0.0, threads=1))
    choice = tuple(max(range(len(row)), key=lambda c: float(row[c].value() or 0)) for row in cells)
    assert problem.feasible(choice)
    return problem.objective(choice)


ANSWERS = """
import numpy as np
from search.backends import pulp
from search.problem import Problem, Row
from search.solve import solve
for seed in range(6):
    random = np.random.default_rng(seed)
    usages = [np.sort(random.integers(1, 50, (60, 5)), axis=1) for _ in range(2)]
    rows = tuple(Row(f"r{k}", "<=", usage, int(usage.mean() * 55)) for k, usage in enumerate(usages))
    found = solve(Problem(np.round(random.random((60, 5)), 1 + seed % 3), rows))
    print(found.choice, found.bound, found.method)
"""


@pytest.mark.slow
def test_every_process_gives_the_same_answers() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", ANSWERS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(printed) == 1
    assert printed.pop().count("(") == 6


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


@pytest.mark.parametrize("rows", [(), (Row("a", "<=", np.array([[1], [0]]), 5),)])
def test_a_group_without_schemes_is_infeasible_and_named(rows: tuple[Row, ...]) -> None:
    solution = solve(Problem(np.array([[1.0], [np.nan]]), rows, groups=("q+k", "o")))
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


def test_the_solution_says_what_decided_and_why(knapsack: Callable[..., Problem]) -> None:
    free = solve(Problem(np.array([[3.0, 1.0]])))
    assert (free.method, free.why) == ("dual", "a choice met on the way is within the gap of its bound")
    usage = np.array([[1, 3]])
    refused = solve(Problem(np.zeros((1, 2)), (Row("x", "<=", usage, 0),)))
    assert (refused.method, refused.why) == ("presolve", "one limit alone cannot be met")
    listed = solve(knapsack(40, 6, 2))
    assert listed.method == "labels"
    assert "groups stayed open" in listed.why
    assert solve(knapsack(40, 6, 2), solver="highs").method == "ilp highs"
    assert solve(knapsack(3, 2), solver="brute").method == "enumeration"
    late = solve(knapsack(2000, 12, 2), time_limit=1e-6)
    assert late.method == "heuristic"
    assert late.why.startswith("time limit")


def test_equal_layers_with_nearly_equal_scores_are_decided() -> None:
    random = np.random.default_rng(0)
    kind = np.arange(96) % 3
    bits = np.array([2, 3, 4, 8])
    size = np.array([[4096], [8192], [20480]])
    costs = (size * 4.0**-bits)[kind] * (1 + 1e-9 * random.normal(size=(96, 4)))
    usage = (size * bits // 8)[kind]
    limit = int(0.6 * usage.min(axis=1).sum() + 0.4 * usage.max(axis=1).sum())
    problem = Problem(costs, (Row("bytes", "<=", usage, limit),))
    found = solve(problem)
    assert found.status is Status.OPTIMAL
    assert found.objective == pytest.approx(_by_bytes(costs, usage, limit), rel=1e-12)


def _by_bytes(costs: np.ndarray, usage: np.ndarray, limit: int) -> float:
    """The best total cost by dynamic programming over exact bytes, one layer after the other."""
    unit = int(np.gcd.reduce(usage.ravel()))
    room = limit // unit
    best = np.full(room + 1, np.inf)
    best[0] = 0.0
    for row, used in zip(costs, usage // unit, strict=True):
        grown = np.full(room + 1, np.inf)
        for cost, step in zip(row.tolist(), used.tolist(), strict=True):
            if step <= room:
                grown[step:] = np.minimum(grown[step:], best[: room + 1 - step] + cost)
        best = grown
    return float(best.min())
