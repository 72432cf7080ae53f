from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search.prepared import Prepared
from search.problem import Problem, ProblemError, Status
from search.solve import solve


def _same(prepared: Prepared, limits: list[int]) -> Status:
    rows = tuple(replace(row, limit=n) for row, n in zip(prepared.problem.rows, limits, strict=True))
    truth, found = solve(prepared.problem.under(rows)), prepared.solve(limits)
    assert (found.status, found.least_budget) == (truth.status, truth.least_budget)
    if truth.objective is not None:
        assert found.objective == pytest.approx(truth.objective, rel=1e-9, abs=1e-21)
    return found.status


def test_random_problems_under_moved_limits(random_case: Callable[[int], Problem]) -> None:
    seen = set()
    for seed in range(60):
        prepared = Prepared(random_case(seed))
        limits = [row.limit for row in prepared.problem.rows]
        for step in (0.0, 0.1, -0.1):
            seen.add(_same(prepared, [limit + round(step * abs(limit)) for limit in limits]))
    assert seen == {Status.OPTIMAL, Status.INFEASIBLE}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_sweep_equals_single_solves(knapsack: Callable[..., Problem], rows: int) -> None:
    prepared = Prepared(knapsack(60, 6, rows))
    ends = [(row.usage.min(axis=1).sum(), row.usage.max(axis=1).sum()) for row in prepared.problem.rows]
    for fill in np.linspace(-0.05, 1.05, 15):
        _same(prepared, [int(low + fill * (high - low)) for low, high in ends])


def test_limits_must_fit_the_rows(knapsack: Callable[..., Problem]) -> None:
    prepared = Prepared(knapsack(3, 2))
    with pytest.raises(ProblemError, match="each of 1 rows. Got 2"):
        prepared.solve([1, 2])
    with pytest.raises(ProblemError, match="gap must be"):
        prepared.solve(gap=-1.0)


def test_the_example_of_the_documentation_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```python\n")[1:] if "Prepared(" in block]
    exec(example.partition("```")[0], {})
