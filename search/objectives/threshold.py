"""Threshold bisection (BitsFusion, LDM-SQNR): each layer gets the smallest scheme whose score stays below one
threshold, and the threshold is bisected to the budget. A heuristic: it proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from search.compile import Compiled
from search.objectives.objective import (
    LOOSE,
    Entry,
    Floats,
    How,
    Optimum,
    Part,
    certified,
    without_arguments,
    without_fused,
)
from search.problem import Choice, Problem, Solution, Status

REASON = "no threshold gives a plan within every limit: take another objective"


@dataclass(frozen=True)
class Threshold:
    """The lowest threshold whose plan is within the limits; "smallest" is by the first limit's resource."""

    text: str = "threshold"
    metrics: tuple[str, ...] = ()

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem as it is. Raises ObjectiveError for fused candidates."""
        without_fused(self.text, compiled)
        return compiled

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """The heuristic's plan with its sum and without a bound; `unknown` where it has none."""
        problem = compiled.problem
        any_plan = how.solve(problem, LOOSE)
        if any_plan.choice is None:
            return Optimum(any_plan)
        sign = 1.0 if problem.direction == "min" else -1.0
        found = _bisected(problem, sign * problem.costs)
        if found is None:
            return Optimum(Solution(Status.UNKNOWN, reason=REASON))
        choice, threshold = found
        solution = certified(choice, problem.objective(choice), None, how)
        return Optimum(solution, (Part("threshold", sign * threshold),))


def _bisected(problem: Problem, costs: Floats) -> tuple[Choice, float] | None:
    """The plan of the lowest threshold that bisection finds, and the threshold."""
    levels = np.unique(costs[~np.isnan(costs) & (costs >= np.nanmin(costs, axis=1).max())])
    low, high = 0, len(levels) - 1
    best = None
    while low <= high:
        middle = (low + high) // 2
        choice = smallest_below(problem, costs, float(levels[middle]))
        if problem.feasible(choice):
            best, high = (choice, float(levels[middle])), middle - 1
        else:
            low = middle + 1
    return best


def smallest_below(problem: Problem, costs: Floats, threshold: float) -> Choice:
    """Per group the scheme that uses least among those that cost at most the threshold, of equals the
    cheapest.
    """
    usage = problem.rows[0].upper()[0] if problem.rows else np.zeros(costs.shape, dtype=np.int64)
    chosen = []
    for group, row in enumerate(costs):
        fitting = [int(scheme) for scheme in np.flatnonzero(row <= threshold)]
        chosen.append(min(fitting, key=lambda scheme: (int(usage[group, scheme]), float(row[scheme]))))
    return tuple(chosen)


def _read(arguments: str) -> Threshold:
    without_arguments("threshold", arguments)
    return Threshold()


THRESHOLD = Entry(
    "threshold",
    "The smallest scheme below one threshold for every layer, bisected to the budget; proves nothing.",
    ("threshold",),
    _read,
)
