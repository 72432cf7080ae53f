"""What every solver of the catalog must keep. A new solver is tested by being listed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from search.catalog import AUTO, SOLVERS
from search.deadline import Deadline
from search.problem import Problem, Row, Solution, Status, relative_gap
from search.solve import solve

NAMES = sorted(SOLVERS)


def _case(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    groups, schemes = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    costs = rng.normal(size=(groups, schemes)) * 10.0 ** rng.integers(-6, 6)
    costs[rng.random(costs.shape) < 0.1] = np.nan
    costs[np.isnan(costs).all(axis=1), 0] = 0.5
    rows = []
    for name in range(int(rng.integers(0, 3))):
        usage = rng.integers(0, 1000, (groups, schemes))
        limit = int(rng.integers(usage.min(axis=1).sum() // 2, usage.max(axis=1).sum() + 2))
        rows.append(Row(str(name), "<=" if rng.random() < 0.7 else ">=", usage, limit))
    return Problem(costs, tuple(rows), "min" if rng.random() < 0.5 else "max")


def _check(problem: Problem, solution: Solution) -> None:
    if solution.status in (Status.INFEASIBLE, Status.UNKNOWN):
        assert solution.choice is solution.objective is solution.gap is None
        return
    assert solution.choice is not None
    assert solution.objective is not None
    assert solution.bound is not None
    assert problem.feasible(solution.choice)
    assert solution.objective == problem.objective(solution.choice)
    assert solution.gap == relative_gap(solution.objective, solution.bound, problem.direction)
    side = 1 if problem.direction == "min" else -1
    assert side * solution.bound <= side * solution.objective


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_oracle(name: str) -> None:
    for seed in range(60):
        problem = _case(seed)
        truth, found = solve(problem, solver="brute"), solve(problem, solver=name)
        _check(problem, found)
        assert found.status == truth.status, seed
        if truth.objective is not None:
            assert found.objective == pytest.approx(truth.objective, rel=1e-9), seed


@pytest.mark.parametrize("name", NAMES)
def test_is_deterministic(name: str) -> None:
    for seed in range(5):
        first, second = solve(_case(seed), solver=name), solve(_case(seed), solver=name)
        assert (first.status, first.choice, first.bound) == (second.status, second.choice, second.bound)


@pytest.mark.parametrize("name", NAMES)
def test_a_passed_deadline_gives_an_honest_answer_soon(name: str) -> None:
    rng = np.random.default_rng(0)
    usage = rng.integers(1, 10**9, (12, 3))
    problem = Problem(rng.random((12, 3)), (Row("x", "<=", usage, int(usage.mean() * 12)),))
    started = time.monotonic()
    solution = SOLVERS[name].solve(problem, 1e-9, Deadline(at=started))
    assert time.monotonic() - started < 20
    assert solution.status is not Status.INFEASIBLE
    if solution.choice is not None and solution.bound is not None and np.isfinite(solution.bound):
        _check(problem, solution)


@pytest.mark.parametrize("name", NAMES)
def test_is_described(name: str) -> None:
    entry = SOLVERS[name]
    assert entry.name == name
    assert entry.summary.endswith(".")
    assert AUTO in SOLVERS
