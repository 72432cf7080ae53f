"""What an exact search over a core found out, before it is turned into a Solution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from search.core import Core, Lagrangian
from search.problem import Choice, Problem, Solution, Status, answered


@dataclass(frozen=True)
class Outcome:
    """`lower`: no choice costs less (exact, in the core's units). `proven`: the choice is a cheapest one.

    `method` and `why`: see Solution.
    """

    choice: Choice | None = None
    lower: Fraction | None = None
    proven: bool = False
    infeasible: bool = False
    log: tuple[str, ...] = ()
    method: str = ""
    why: str = ""

    def noted(self, *lines: str) -> Outcome:
        """The same with more lines in the log."""
        return replace(self, log=self.log + lines)


def lower_bound(bound: Lagrangian) -> Fraction:
    """The Lagrangian bound in cost units of the core."""
    return Fraction(bound.lower, 2**bound.bits)


def solution_of(
    problem: Problem, core: Core, outcome: Outcome, target: float, choice: Choice | None = None
) -> Solution:
    """The outcome in the problem's own direction and numbers, with status and gap.

    `choice` is that of the whole problem where the core is a part of it.
    """
    found = _solution_of(problem, core, outcome, target, choice)
    return replace(found, method=outcome.method, why=outcome.why, log=outcome.log)


def _solution_of(
    problem: Problem, core: Core, outcome: Outcome, target: float, choice: Choice | None
) -> Solution:
    if outcome.infeasible:
        return Solution(Status.INFEASIBLE)
    bound = None
    if outcome.lower is not None:
        bound = float((outcome.lower + core.offset) * core.unit) * (1 if problem.direction == "min" else -1)
    if outcome.choice is None:
        return Solution(Status.UNKNOWN, bound=bound)
    worst = float("-inf") if problem.direction == "min" else float("inf")
    return answered(
        problem,
        outcome.choice if choice is None else choice,
        worst if bound is None else bound,
        target,
        proven=outcome.proven or _indistinguishable(core, outcome),
    )


def _indistinguishable(core: Core, outcome: Outcome) -> bool:
    """Whether float64 cannot tell the bound from the objective."""
    if outcome.lower is None or outcome.choice is None:
        return False
    cost = core.total(outcome.choice)
    return cost - outcome.lower <= abs(cost + core.offset) / 2**53
