"""The oracle: every choice, in exact arithmetic. For tests and tiny problems."""

from __future__ import annotations

import math

import numpy as np

from search.core import Core, core_of
from search.deadline import Deadline
from search.outcome import Outcome, solution_of
from search.problem import Choice, Problem, ProblemError, Solution

MOST_CHOICES = 5_000_000
METHOD = "enumeration"


def solve_brute(problem: Problem, gap: float, deadline: Deadline) -> Solution:
    """Tries every choice. Raises ProblemError above five million of them."""
    count = math.prod(int(offered) for offered in problem.offered.sum(axis=1))
    if count > MOST_CHOICES:
        raise ProblemError(
            f"Brute force must have at most {MOST_CHOICES} choices. Got {count}. Use the lagrangian solver."
        )
    core = core_of(problem)
    return solution_of(problem, core, enumerate_core(core, deadline), gap)


def enumerate_core(core: Core, deadline: Deadline) -> Outcome:
    """The cheapest feasible choice by depth-first enumeration; the first of equals in scheme order."""
    cells = [[int(scheme) for scheme in np.flatnonzero(row)] for row in core.open]
    best: Choice | None = None
    best_cost: int | None = None
    stack: list[tuple[Choice, int, tuple[int, ...]]] = [((), 0, (0,) * len(core.usage))]
    while stack:
        prefix, cost, used = stack.pop()
        if len(prefix) == len(cells):
            fits = all(total <= limit for total, limit in zip(used, core.limit, strict=True))
            if fits and (best_cost is None or cost < best_cost):
                best, best_cost = prefix, cost
            continue
        if deadline.passed():
            return Outcome(best, method=METHOD, why="time limit: not every choice was tried")
        group = len(prefix)
        for scheme in reversed(cells[group]):
            grown = tuple(
                total + int(rows[group, scheme]) for total, rows in zip(used, core.usage, strict=True)
            )
            stack.append(((*prefix, scheme), cost + core.cost[group, scheme], grown))
    return Outcome(
        best, proven=best is not None, infeasible=best is None, method=METHOD, why="every choice was tried"
    )
