"""What an exact search over a core found out, before it is turned into a Solution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from search.core import Core, Lagrangian
from search.problem import Choice, Problem, Solution, Status, answered


@dataclass(frozen=True)
class Outcome:
    """`lower`: no choice costs less (exact, in the core's units). `proven`: the choice is a cheapest one."""

    choice: Choice | None = None
    lower: Fraction | None = None
    proven: bool = False
    infeasible: bool = False
    log: tuple[str, ...] = ()

    def noted(self, *lines: str) -> Outcome:
        """The same with more lines in the log."""
        return replace(self, log=self.log + lines)


def lower_bound(bound: Lagrangian) -> Fraction:
    """The Lagrangian bound in cost units of the core."""
    return Fraction(bound.lower, 2**bound.bits)


def solution_of(problem: Problem, core: Core, outcome: Outcome, target: float) -> Solution:
    """The outcome in the problem's own direction and numbers, with status and gap."""
    if outcome.infeasible:
        return Solution(Status.INFEASIBLE, log=outcome.log)
    bound = None
    if outcome.lower is not None:
        bound = float(outcome.lower * core.unit) * (1 if problem.direction == "min" else -1)
    if outcome.choice is None:
        return Solution(Status.UNKNOWN, bound=bound, log=outcome.log)
    worst = float("-inf") if problem.direction == "min" else float("inf")
    found = answered(
        problem, outcome.choice, worst if bound is None else bound, target, proven=outcome.proven
    )
    return replace(found, log=outcome.log)
