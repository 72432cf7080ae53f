"""The default solver: a Lagrangian dual shrinks the problem, a label search or an ILP finishes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from search.core import (
    Core,
    Lagrangian,
    core_of,
    drop_dominated,
    drop_loose_rows,
    fix_by_bound,
    lagrangian,
    most_open,
    shrink_by_limits,
)
from search.deadline import Deadline
from search.dual import solve_dual
from search.labels import search_labels
from search.outcome import Outcome, lower_bound, solution_of
from search.polish import polish
from search.problem import SMALLEST_OBJECTIVE, Choice, Problem, Solution
from search.solvers.ilp import solve_ilp_highs

ROUNDS = 4
POLISHED = 3

Finish = Callable[[Core, Lagrangian, Choice | None, Deadline], Outcome]


def solve_lagrangian(problem: Problem, gap: float, deadline: Deadline) -> Solution:
    """Exact within `gap`: dual bound and reduced-cost fixing, then labels, or HiGHS if there are too many."""
    core = core_of(problem)
    return solution_of(problem, core, minimize(core, gap, deadline), gap)


def minimize(core: Core, gap: float, deadline: Deadline) -> Outcome:
    """`shrink_and_finish` with the label search and HiGHS behind it."""
    return shrink_and_finish(core, gap, deadline, labels_then_ilp)


def labels_then_ilp(core: Core, bound: Lagrangian, incumbent: Choice | None, deadline: Deadline) -> Outcome:
    """Exhausts the core with labels; HiGHS takes over where they grow too many."""
    found = search_labels(core, bound, incumbent, deadline)
    if not found.complete:
        return solve_ilp_highs(core, bound, incumbent, deadline).noted("labels: too many, handed to HiGHS")
    choice = _better(core, found.choice, incumbent)
    return Outcome(choice, proven=choice is not None, infeasible=choice is None, log=("labels: exhausted",))


@dataclass(frozen=True, eq=False)
class _Shrunk:
    bound: Lagrangian
    incumbent: Choice | None
    log: tuple[str, ...]


def shrink_and_finish(core: Core, gap: float, deadline: Deadline, finish: Finish) -> Outcome:
    """Presolve, then `finish` on what is left unless the gap is closed already. Closes cells of `core`."""
    cells = int(core.open.sum())
    if not shrink_by_limits(core):
        return Outcome(infeasible=True, log=("presolve: one limit alone cannot be met",))
    drop_loose_rows(core)
    drop_dominated(core)
    shrunk = _shrink(core, gap, deadline)
    if isinstance(shrunk, Outcome):
        return shrunk
    left = int((core.open.sum(axis=1) > 1).sum())
    note = (
        f"presolve: {int(core.open.sum())} of {cells} cells left, {left} of {len(core.open)} groups undecided"
    )
    lower = lower_bound(shrunk.bound)
    if deadline.passed():
        return Outcome(shrunk.incumbent, lower, log=(*shrunk.log, note, "time limit: presolve only"))
    finished = finish(core, shrunk.bound, shrunk.incumbent, deadline)
    if finished.lower is None or finished.lower < lower:
        finished = replace(finished, lower=lower)
    finished = _certify(core, shrunk.bound, finished, gap, deadline)
    return replace(finished, log=(*shrunk.log, note, *finished.log))


def _certify(core: Core, bound: Lagrangian, finished: Outcome, gap: float, deadline: Deadline) -> Outcome:
    """A last label search where a backend's tolerance leaves the gap open: it counts in exact integers."""
    choice, lower = finished.choice, finished.lower
    if finished.proven or choice is None or lower is None or _within(core, choice, lower, gap):
        return finished
    fix_by_bound(core, bound, choice)
    found = search_labels(core, bound, choice, deadline)
    if not found.complete:
        return finished
    best = _better(core, found.choice, choice)
    return replace(finished, choice=best, proven=True).noted("labels: certified")


def _shrink(core: Core, gap: float, deadline: Deadline) -> _Shrunk | Outcome:
    """Rounds of dual, incumbent and fixing while they rule cells out."""
    incumbent: Choice | None = None
    log: tuple[str, ...] = ()
    for _ in range(ROUNDS):
        before = int(core.open.sum())
        dual = solve_dual(core, deadline)
        bound = max((lagrangian(core, dual.multipliers), lagrangian(core, _zeros(core))), key=lower_bound)
        if lower_bound(bound) > int(most_open(core.cost, core.open).sum()):
            return Outcome(infeasible=True, log=(*log, "dual: the bound passes every choice"))
        incumbent = _better(core, incumbent, _incumbent(core, dual.choices, deadline))
        log = (*log, f"dual: {len(dual.choices)} choices, bound {float(lower_bound(bound) * core.unit):.12g}")
        if incumbent is not None:
            if _within(core, incumbent, lower_bound(bound), gap):
                return Outcome(incumbent, lower_bound(bound), log=(*log, "gap closed by the dual bound"))
            fix_by_bound(core, bound, incumbent)
            fix_by_bound(core, lagrangian(core, _zeros(core)), incumbent)
        if incumbent is None or deadline.passed() or int(core.open.sum()) > 0.9 * before:
            break
        shrink_by_limits(core)
    return _Shrunk(lagrangian(core, dual.multipliers), incumbent, log)


def _zeros(core: Core) -> tuple[Fraction, ...]:
    return (Fraction(0),) * len(core.usage)


def _incumbent(core: Core, choices: tuple[Choice, ...], deadline: Deadline) -> Choice | None:
    feasible = core.best(choices)
    starts = [choice for choice in (feasible, *reversed(choices)) if choice is not None][:POLISHED]
    polished = [polish(core, start, deadline) for start in starts]
    return core.best([choice for choice in (feasible, *polished) if choice is not None])


def _better(core: Core, first: Choice | None, second: Choice | None) -> Choice | None:
    return core.best([choice for choice in (first, second) if choice is not None])


def _within(core: Core, choice: Choice, lower: Fraction, gap: float) -> bool:
    cost = core.total(choice)
    least = Fraction(SMALLEST_OBJECTIVE) / core.unit
    size = max(least, Fraction(abs(cost)))
    return cost - lower <= Fraction(gap) * size
