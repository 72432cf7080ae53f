"""The worst of several sums as good as it can be: robust over contexts, such as timesteps or domains.

min t with t >= the sum of every metric. The Lagrangian dual over the metrics' weights (one additive program
per evaluation, Kelley's cuts between them) gives a bound and plans at once; an integer program with one row
per metric closes the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np

from search.backends import highspy
from search.compile import Compiled
from search.objectives.objective import (
    Entry,
    Floats,
    How,
    ObjectiveError,
    Optimum,
    Part,
    certified,
    costs_of,
    distinct,
    listed,
    metric_of,
    total_of,
)
from search.objectives.program import Program, cost_terms, extremes, least
from search.problem import Choice, Problem, Solution, relative_gap

EXAMPLE = "worst: output_kl@code, output_kl@text"
ROUNDS = 12
COARSE = 1e-5


@dataclass(frozen=True)
class Worst:
    """The largest of the metrics' sums (the smallest where more is better; all must have one direction)."""

    metrics: tuple[str, ...]

    @property
    def text(self) -> str:
        """With its metrics."""
        return "worst: " + ", ".join(self.metrics)

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem as it is."""
        return compiled

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """Dual bound, then the integer program."""
        directions = [metric_of(compiled, name).direction for name in self.metrics]
        for (name, first), (other, second) in pairwise(zip(self.metrics, directions, strict=True)):
            if first != second:
                raise ObjectiveError(
                    "The metrics of the objective worst must have one direction."
                    f" Got {name} ({first}) and {other} ({second})."
                )
        sign = 1.0 if directions[0] == "min" else -1.0
        costs = [sign * costs_of(compiled, name) for name in self.metrics]
        search = _Search(compiled.problem, costs, how)
        failed = search.run()
        if failed is not None:
            return Optimum(failed)
        best, bound = search.best, search.bound
        assert best is not None
        solution = certified(
            best,
            sign * float(search.value(best)),
            None if bound is None else sign * float(bound),
            how,
            directions[0],
            tuple(search.log),
        )
        totals = zip(self.metrics, search.totals(best), strict=True)
        return Optimum(solution, tuple(Part(name, sign * float(total)) for name, total in totals))


class _Search:
    """The best plan so far, and the largest proven bound; everything is minimized."""

    def __init__(self, problem: Problem, costs: Sequence[Floats], how: How) -> None:
        offered = problem.offered & ~np.isnan(costs).any(axis=0)
        self._problem = replace(problem, costs=np.where(offered, 0.0, np.nan), direction="min")
        self._costs = [np.where(offered, values, np.nan) for values in costs]
        self._how = how
        self.best: Choice | None = None
        self.bound: Fraction | None = None
        self.log: list[str] = []

    def run(self) -> Solution | None:
        """Searches to the gap or the deadline; a solution only where there is no plan."""
        failed = self._dual()
        if failed is not None or self._close() or self._how.deadline.passed():
            return failed
        ranges = [extremes(costs) for costs in self._costs]
        span = max(low for low, _ in ranges), max(high for _, high in ranges)
        found = least(lambda unit: self._program(span[0], unit), self._problem, self.value, span, self._how)
        if found.choice is not None:
            self._take(found.choice)
        if found.bound is not None:
            self._raise(found.bound)
        self.log.append(f"worst: bound {float(self.bound or 0):.12g} by the integer program")
        return None

    def value(self, choice: Choice) -> Fraction:
        """The largest sum of a choice, exact."""
        return max(self.totals(choice))

    def totals(self, choice: Choice) -> tuple[Fraction, ...]:
        """The sums of a choice, exact."""
        return tuple(total_of(costs, choice) for costs in self._costs)

    def _dual(self) -> Solution | None:
        """Bound and plans from weighted sums; a solution where there is no plan at all."""
        master = _Weights(len(self._costs))
        weights = np.full(len(self._costs), 1.0 / len(self._costs))
        for _ in range(ROUNDS):
            pairs = zip(weights, self._costs, strict=True)
            mixed = np.asarray(sum((weight * costs for weight, costs in pairs), np.zeros(())))
            found = self._how.solve(replace(self._problem, costs=mixed), COARSE)
            if found.choice is None:
                return found if self.best is None else None
            self._take(found.choice)
            if found.bound is not None:
                self._raise(Fraction(found.bound))
            weights, promised = master.next([float(total) for total in self.totals(found.choice)])
            if self._close() or promised - float(self.bound or 0) <= COARSE * abs(promised):
                break
        self.log.append(f"worst: bound {float(self.bound or 0):.12g} by weights")
        return None

    def _program(self, low: Fraction, unit: Fraction) -> Program:
        """min t with t at least every sum."""
        program = Program(self._problem, low, unit)
        highest = program.model.add_variable("t", 0)
        program.minimize([(highest, 1.0)])
        for costs in self._costs:
            terms = cost_terms(program, costs)
            program.add([*terms, (highest, -1.0)], "<=", program.scaled(low - extremes(costs)[0]))
        return program

    def _take(self, choice: Choice) -> None:
        if self.best is None or self.value(choice) < self.value(self.best):
            self.best = choice

    def _raise(self, bound: Fraction) -> None:
        self.bound = bound if self.bound is None else max(self.bound, bound)

    def _close(self) -> bool:
        if self.bound is None or self.best is None:
            return False
        return relative_gap(float(self.value(self.best)), float(self.bound)) <= self._how.gap


class _Weights:
    """Weights that maximize the least weighted total of the plans so far (Kelley's master program)."""

    def __init__(self, metrics: int) -> None:
        self._program = highspy.Highs()
        self._program.setOptionValue("output_flag", False)
        self._program.setOptionValue("threads", 1)
        self._program.addVar(-highspy.kHighsInf, highspy.kHighsInf)
        self._program.changeColCost(0, -1.0)
        for _ in range(metrics):
            self._program.addVar(0.0, 1.0)
        self._columns = np.arange(metrics + 1, dtype=np.int32)
        self._program.addRow(1.0, 1.0, metrics, self._columns[1:], np.ones(metrics))
        self._scale = 0.0

    def next(self, totals: Sequence[float]) -> tuple[Floats, float]:
        """The next weights, and what the least weighted total would then be at best."""
        self._scale = self._scale or max(map(abs, totals)) or 1.0
        cut = np.concatenate([[1.0], -np.asarray(totals) / self._scale])
        self._program.addRow(-highspy.kHighsInf, 0.0, len(self._columns), self._columns, cut)
        self._program.run()
        solution = np.array(self._program.getSolution().col_value)
        weights = np.clip(solution[1:], 0.0, 1.0)
        return weights / (weights.sum() or 1.0), float(solution[0]) * self._scale


def _read(arguments: str) -> Worst:
    return Worst(distinct("worst", listed("worst", arguments, 2, EXAMPLE)))


WORST = Entry(
    "worst",
    "The worst of several metrics' sums, for example over contexts, as good as it can be; exact.",
    (EXAMPLE,),
    _read,
    names_all=True,
)
