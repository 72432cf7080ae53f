"""A whole problem as an integer program in PuLP, for objectives that are no sum of costs or bring many rows.

HiGHS solves it. As in `search.solvers.ilp` nothing it says is believed without a check: the choice is
rounded and its limits are checked on integers (one that breaks them is cut off), its value is computed anew
in exact numbers, and the bound is HiGHS's own less a margin for its tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from search.backends import pulp
from search.objectives.objective import Floats, How
from search.problem import Choice, Problem, Row, relative_gap
from search.solvers.ilp import MARGIN, MOST_CUTS, RANGE, run_highs

Term = tuple[Any, float]


@dataclass(frozen=True)
class Found:
    """What a program came to; `bound` holds for every choice, `infeasible` is proven."""

    choice: Choice | None = None
    bound: Fraction | None = None
    infeasible: bool = False


class Program:
    """The offered cells of a problem as binaries, one of each group, under the problem's limits. Its
    objective is (value - `low`) / `unit`.
    """

    def __init__(self, problem: Problem, low: Fraction, unit: Fraction) -> None:
        self.low, self.unit = low, unit
        self.model = pulp.LpProblem("program", pulp.LpMinimize)
        self.cells: dict[tuple[int, int], Any] = {
            (int(group), int(scheme)): self.model.add_variable(f"x_{group}_{scheme}", 0, 1, "Integer")
            for group, scheme in np.argwhere(problem.offered)
        }
        self._groups = len(problem.costs)
        for group in range(self._groups):
            self.add([(self.cells[cell], 1.0) for cell in self.cells if cell[0] == group], "==", 1.0)
        for row in problem.rows:
            self._limit(row, problem)

    def minimize(self, terms: Iterable[Term]) -> None:
        """Sets the objective, which has no constant: `low` is it."""
        self.model += _weighted(terms)

    def add(self, terms: Iterable[Term], relation: str, right: float) -> None:
        """One more row."""
        left = _weighted(terms)
        self.model += {"==": left == right, "<=": left <= right, ">=": left >= right}[relation]

    def scaled(self, cost: Fraction | float) -> float:
        """A cost in units of the objective."""
        return float(Fraction(cost) / self.unit)

    def choice(self, values: dict[str, float]) -> Choice | None:
        """The cell nearest to 1 of every group; None without values."""
        if not values:
            return None
        best, chosen = [-math.inf] * self._groups, [0] * self._groups
        for (group, scheme), variable in self.cells.items():
            if values[variable.name] > best[group]:
                best[group], chosen[group] = values[variable.name], scheme
        return tuple(chosen)

    def forbid(self, choice: Choice) -> None:
        """Cuts off one choice."""
        picked = [(self.cells[group, scheme], 1.0) for group, scheme in enumerate(choice)]
        self.add(picked, "<=", len(picked) - 1.0)

    def _limit(self, row: Row, problem: Problem) -> None:
        """A limit in units of its largest step, less what is used at least."""
        usage, limit = row.upper()
        offered = np.where(problem.offered, usage, usage.max())
        least = offered.min(axis=1)
        above = {cell: int(usage[cell]) - int(least[cell[0]]) for cell in self.cells}
        step = max(above.values()) or 1
        room = limit - sum(int(value) for value in least)
        terms = [(self.cells[cell], float(Fraction(used, step))) for cell, used in above.items() if used]
        self.add(terms, "<=", float(Fraction(room, step)))


def least(
    build: Callable[[Fraction], Program],
    problem: Problem,
    value: Callable[[Choice], Fraction],
    span: tuple[Fraction, Fraction],
    how: How,
) -> Found:
    """The choice of the least value. `build` makes the program for a unit; `span` holds a value that no
    choice is below, and one that none is above. Solved again in a finer unit where the first leaves the gap
    open.
    """
    low, high = span
    if high <= low:
        high = low + (abs(low) or 1)
    found = _solved(build((high - low) / int(RANGE)), problem, how)
    if found.choice is None or found.bound is None:
        return found
    best, bound = value(found.choice), max(low, found.bound)
    if best > low and relative_gap(float(best), float(bound)) > how.gap and not how.deadline.passed():
        again = _solved(build((best - low) / int(RANGE)), problem, how)
        choices = [choice for choice in (found.choice, again.choice) if choice is not None]
        return Found(min(choices, key=value), bound if again.bound is None else max(bound, again.bound))
    return Found(found.choice, bound)


def _solved(program: Program, problem: Problem, how: How) -> Found:
    bound = None
    for _ in range(MOST_CUTS):
        raw = run_highs(program.model, how.deadline)
        if raw.infeasible:
            return Found(infeasible=True)
        if math.isfinite(raw.bound):
            bound = program.low + Fraction(raw.bound - MARGIN) * program.unit
        choice = program.choice(raw.values)
        if choice is None or problem.feasible(choice):
            return Found(choice, bound)
        if how.deadline.passed():
            break
        program.forbid(choice)
    return Found(bound=bound)


def extremes(costs: Floats) -> tuple[Fraction, Fraction]:
    """The sums of every group's smallest and largest cost, NaN passed over."""
    pairs = ((np.nanmin(row), np.nanmax(row)) for row in costs)
    lows, highs = zip(*((Fraction(float(low)), Fraction(float(high))) for low, high in pairs), strict=True)
    return sum(lows, Fraction(0)), sum(highs, Fraction(0))


def _weighted(terms: Iterable[Term]) -> Any:
    return pulp.lpSum([weight * variable for variable, weight in terms])


def cost_terms(program: Program, costs: Floats) -> list[Term]:
    """Every cell's cost above the least one of its group, in units of the objective."""
    floor = [Fraction(float(value)) for value in np.nanmin(costs, axis=1)]
    return [
        (variable, program.scaled(Fraction(float(costs[group, scheme])) - floor[group]))
        for (group, scheme), variable in program.cells.items()
    ]
