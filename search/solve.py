"""The front door: one problem in, one certified solution out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np

from search.catalog import AUTO, SOLVERS, Solve
from search.core import Core, core_of
from search.deadline import Deadline
from search.prices import shadow_prices
from search.problem import DEFAULT_GAP, Problem, ProblemError, Row, Solution, Status, named_rows
from search.solvers.lagrangian import minimize

LEAST_BUDGET_SECONDS = 20.0


def solve(
    problem: Problem,
    *,
    solver: str = "auto",
    gap: float = DEFAULT_GAP,
    time_limit: float | None = None,
    prices: bool = False,
) -> Solution:
    """Solves a problem to a relative gap.

    `optimal` means gap <= `gap`, proven. `infeasible` is proven too and brings the least budgets. At the
    time limit (seconds) the best known choice comes back as `feasible` with its gap, or `unknown` without a
    choice. With `prices` it brings the limits' shadow prices too. Raises ProblemError for an unknown solver,
    a negative gap or time limit.

    >>> import numpy as np
    >>> solve(Problem(np.array([[3.0, 1.0], [2.0, 0.5]]))).objective
    1.5
    """
    if solver != "auto" and solver not in SOLVERS:
        raise ProblemError(f"The solver must be one of auto, {', '.join(SOLVERS)}. Got {solver!r}.")
    name = AUTO if solver == "auto" else solver
    solution = certified(problem, name, SOLVERS[name].solve, gap, time_limit)
    if prices and solution.choice is not None:
        return replace(solution, prices=solution.prices or shadow_prices(problem))
    return solution if prices else replace(solution, prices={})


def certified(problem: Problem, solver: str, run: Solve, gap: float, time_limit: float | None) -> Solution:
    """What `run` finds, checked against every limit; where nothing fits, with what would.

    Raises ProblemError for a negative gap or time limit.
    """
    check(gap, time_limit)
    started = time.perf_counter()
    solution = run(problem, gap, Deadline.after(time_limit))
    seconds = time.perf_counter() - started
    if solution.choice is not None and not problem.feasible(solution.choice):
        raise RuntimeError(f"The {solver} solver must return a feasible choice. Got {solution.choice}.")
    if solution.status is Status.INFEASIBLE:
        solution = replace(solution, least_budget=least_budget(problem, time_limit), reason=_reason(problem))
    return replace(solution, seconds=seconds, solver=solver)


def least_budget(problem: Problem, time_limit: float | None = None) -> Mapping[str, Fraction]:
    """Per limited resource, the value its limit would need, in the resource's unit, exact.

    For "<=" this is the smallest total of that resource among the choices that keep the other limits (for
    ">=" the largest). Where no choice keeps the other limits either, it is the smallest (largest) total at
    all. A resource limited from both sides has two entries, the second named `resource>=`. Empty when a
    group is offered nothing.
    """
    if not problem.offered.any(axis=1).all():
        return {}
    seconds = min(LEAST_BUDGET_SECONDS, math.inf if time_limit is None else max(1.0, time_limit))
    deadline = Deadline.after(seconds)
    return {name: _least(problem, row, deadline) * row.unit for name, row in named_rows(problem).items()}


def _least(problem: Problem, row: Row, deadline: Deadline) -> int:
    """The best total of one row under the other rows, else on its own."""
    others = replace(problem, rows=tuple(other for other in problem.rows if other is not row))
    sign = 1 if row.relation == "<=" else -1
    base = core_of(others)
    core = Core(row.upper()[0].astype(object), Fraction(1), base.usage, base.limit, base.open)
    found = minimize(core, 0.0, deadline)
    if found.choice is not None:
        return row.total(found.choice)
    alone = np.where(problem.offered, row.upper()[0], row.upper()[0].max() + 1)
    return sign * int(alone.min(axis=1).sum())


def _reason(problem: Problem) -> str:
    """Names the group that is offered nothing, or the limits that cannot be met even alone."""
    for group, offered in zip(problem.groups, problem.offered, strict=True):
        if not offered.any():
            return f"no scheme is left for {group}: its ties and pins contradict each other"
    alone = []
    for row in problem.rows:
        usage, limit = row.upper()
        if int(np.where(problem.offered, usage, usage.max() + 1).min(axis=1).sum()) > limit:
            alone.append(row.resource)
    if alone:
        return f"no plan is within the limit on {', '.join(alone)}"
    return "the limits cannot hold together: " + ", ".join(row.resource for row in problem.rows)


def check(gap: float, time_limit: float | None) -> None:
    """Raises ProblemError for a negative gap or time limit."""
    if not (gap >= 0 and math.isfinite(gap)):
        raise ProblemError(f"The gap must be a number of 0 or more. Got {gap}.")
    if time_limit is not None and not (time_limit > 0):
        raise ProblemError(f"The time limit must be a number of seconds above 0. Got {time_limit}.")
