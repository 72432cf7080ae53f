"""The worst layer as good as it can be; and of all such plans the one with the least sum (DMMV).

min t with t >= cost of every group: t is one of the costs, so bisection over the sorted distinct costs, with
a proof at each step whether any plan stays below, is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from search.compile import Compiled
from search.objectives.objective import (
    LOOSE,
    Entry,
    Floats,
    How,
    Optimum,
    Part,
    any_choice,
    certified,
    without_arguments,
    without_fused,
)
from search.problem import Choice, Problem, Solution, Status

LARGEST = "largest cost of a group"


@dataclass(frozen=True)
class Minimax:
    """The largest cost of any group (the smallest where more is better); `then_sum`: ties by the sum."""

    then_sum: bool = False
    metrics: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """By its name alone."""
        return "minimax_sum" if self.then_sum else "minimax"

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem as it is. Raises ObjectiveError for fused candidates."""
        without_fused(self.text, compiled)
        return compiled

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """The least largest cost; then, if asked for, the least sum at that cost."""
        problem = compiled.problem
        first = least_largest(problem, replace(how, gap=0.0) if self.then_sum else how)
        if first.choice is None or first.objective is None:
            return Optimum(first)
        part = Part(LARGEST, first.objective, first.bound, first.gap)
        if not self.then_sum:
            return Optimum(first, (part,))
        return _then_sum(problem, first, part, how)


def least_largest(problem: Problem, how: How) -> Solution:
    """The choice whose worst cost is best, with its certificate."""
    sign = 1.0 if problem.direction == "min" else -1.0
    costs = sign * problem.costs
    start = how.solve(problem, LOOSE)
    if start.choice is None:
        return start
    levels = _levels(costs, start.choice)
    best, low, unsure = start.choice, 0, len(levels)
    high = len(levels) - 1
    while low < min(high, unsure):
        middle = (low + min(high, unsure)) // 2
        found, proven = any_choice(_below(problem, costs, float(levels[middle])), how)
        if found is not None:
            best, high = found, int(np.searchsorted(levels, _largest(costs, found)))
        elif proven:
            low = middle + 1
        else:
            unsure = middle
    log = (f"minimax: {len(levels)} levels, bound at {low}, answer at {high}",)
    bound = sign * float(levels[min(low, high)])
    return certified(best, sign * _largest(costs, best), bound, how, problem.direction, log)


def _then_sum(problem: Problem, first: Solution, part: Part, how: How) -> Optimum:
    assert first.choice is not None
    sign = 1.0 if problem.direction == "min" else -1.0
    costs = sign * problem.costs
    second = how.solve(_below(problem, costs, _largest(costs, first.choice)))
    if second.choice is None:
        second = certified(first.choice, problem.objective(first.choice), None, how, problem.direction)
    total = problem.objective(second.choice or first.choice)
    if first.status is not Status.OPTIMAL:
        second = replace(second, status=Status.FEASIBLE)
    return Optimum(second, (part, Part("sum", total, second.bound, second.gap)))


def _levels(costs: Floats, choice: Choice) -> Floats:
    """The values that the largest cost can have at best: from what no choice is below to what one reaches."""
    least = float(np.nanmin(costs, axis=1).max())
    levels = np.unique(costs[~np.isnan(costs)])
    return np.asarray(levels[(levels >= least) & (levels <= _largest(costs, choice))])


def _largest(costs: Floats, choice: Choice) -> float:
    return float(costs[np.arange(len(choice)), list(choice)].max())


def _below(problem: Problem, costs: Floats, level: float) -> Problem:
    """The problem without the cells that cost more than a level."""
    return replace(problem, costs=np.where(costs <= level, problem.costs, np.nan))


def _read(name: str, arguments: str) -> Minimax:
    without_arguments(name, arguments)
    return Minimax(then_sum=name == "minimax_sum")


MINIMAX = Entry(
    "minimax",
    "The largest cost of any group of layers, as small as it can be; exact by bisection.",
    ("minimax",),
    lambda arguments: _read("minimax", arguments),
)
MINIMAX_SUM = Entry(
    "minimax_sum",
    "The largest cost first, then the sum among the plans that reach it (DMMV); exact.",
    ("minimax_sum",),
    lambda arguments: _read("minimax_sum", arguments),
)
