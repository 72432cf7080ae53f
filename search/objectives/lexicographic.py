"""Several metrics one after the other: the best first one, then the best second one that costs the first no
more than a tolerance, and so on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from search.compile import Compiled
from search.objectives.objective import (
    Entry,
    How,
    ObjectiveError,
    Optimum,
    Part,
    certified,
    costs_of,
    distinct,
    limited,
    listed,
    metric_of,
    total_of,
)
from search.problem import Problem, Solution, Status
from sensitivity.table import exact_decimal

EXAMPLE = "lexicographic: output_kl within 1%, weight_error"
_STAGE = re.compile(r"(?P<metric>.+?)(?:\s+within\s+(?P<number>\d+(?:\.\d*)?|\.\d+)\s*%)?")


@dataclass(frozen=True)
class Lexicographic:
    """Metrics in the order of their importance, each with the part of its best total (in absolute value) that
    later ones may cost it.
    """

    stages: tuple[tuple[str, Fraction], ...]

    @property
    def text(self) -> str:
        """With tolerances in percent, where there are any."""
        return "lexicographic: " + ", ".join(
            metric + (f" within {exact_decimal(100 * tolerance)}%" if tolerance else "")
            for metric, tolerance in self.stages
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """All stages."""
        return tuple(metric for metric, _ in self.stages)

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem as it is: only the first stage's solution tells what the second one may cost."""
        return compiled

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """A program per stage, the earlier stages as limits in exact numbers."""
        problem, parts = compiled.problem, []
        proven, solution = True, None
        for metric, tolerance in self.stages:
            direction = metric_of(compiled, metric).direction
            stage = replace(problem, costs=costs_of(compiled, metric), direction=direction)
            solution = _solved(stage, solution, how)
            if solution.choice is None or solution.objective is None:
                return Optimum(solution)
            proven &= solution.status is Status.OPTIMAL
            parts.append(Part(metric, solution.objective, solution.bound, solution.gap))
            problem = _kept(stage, solution, metric, tolerance)
        assert solution is not None
        status = Status.OPTIMAL if proven else Status.FEASIBLE
        return Optimum(replace(solution, status=status), tuple(parts))


def _solved(stage: Problem, before: Solution | None, how: How) -> Solution:
    """The stage's best choice; where time runs out before there is any, the one of the stage before."""
    found = how.solve(stage)
    if found.choice is None and before is not None and before.choice is not None:
        return certified(before.choice, stage.objective(before.choice), None, how, stage.direction)
    return found


def _kept(stage: Problem, solution: Solution, metric: str, tolerance: Fraction) -> Problem:
    """The problem with one more limit: the stage's total, give or take the tolerance."""
    assert solution.choice is not None
    total = total_of(stage.costs, solution.choice)
    allowed = abs(total) * tolerance
    if stage.direction == "min":
        row = limited(metric, stage.costs, "<=", total + allowed)
    else:
        row = limited(metric, stage.costs, ">=", total - allowed)
    return replace(stage, rows=(*stage.rows, row))


def _read(arguments: str) -> Lexicographic:
    stages = [_stage(text) for text in listed("lexicographic", arguments, 2, EXAMPLE)]
    distinct("lexicographic", [metric for metric, _ in stages])
    return Lexicographic(tuple(stages))


def _stage(text: str) -> tuple[str, Fraction]:
    found = _STAGE.fullmatch(text)
    assert found is not None, "the pattern takes any text that is not empty"
    percent = Fraction(Decimal(found["number"] or "0"))
    if percent > 1000 or " within" in found["metric"]:
        raise ObjectiveError(
            f"A tolerance must be written METRIC within NUMBER%, at most 1000, as in {EXAMPLE!r}."
            f" Got {text!r:.80}."
        )
    return found["metric"], percent / 100


LEXICOGRAPHIC = Entry(
    "lexicographic",
    "Metrics by importance: each as good as the ones before it allow, within their tolerances; exact.",
    (EXAMPLE,),
    _read,
    names_all=True,
)
