"""The default solver: a Lagrangian dual shrinks the problem, a search in two halves or an ILP finishes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from search.core import (
    Core,
    Lagrangian,
    Mask,
    drop_dominated,
    drop_loose_rows,
    fix_by_bound,
    fold,
    lagrangian,
    most_open,
    shrink_by_limits,
)
from search.deadline import Deadline
from search.dual import Visit, climb, solve_dual
from search.items import alike
from search.labels import FEWER, MOST_LABELS, Searched, search_labels
from search.outcome import Outcome, lower_bound, solution_of
from search.polish import polish
from search.prices import prices_at
from search.problem import SMALLEST_OBJECTIVE, Choice, Problem, Solution, Status, answered
from search.screen import BEYOND, Image, Indices, Priced, Screen
from search.solvers.ilp import solve_ilp_highs

ROUNDS = 4
POLISHED = 3
NEARLY = 1e-6
MOST_OPEN = 1_000
NEIGHBORS = 40
TURNS = 30
PATIENCE = 4
LEAST_GAIN = 1e-6
TIED = 100
ALONE = "one limit alone cannot be met"
TOO_MANY = "too many choices stayed open to list them"
NEAR_ENOUGH = "changes of some groups at a time came within the gap of the dual's bound"
CORES = (45, 140, 400)
"""Undecided groups that are searched before an incumbent has narrowed them down."""
REPEATED = 8
"""Groups of a kind, on average, where groups of equal usage are listed together, however many are open."""
MOST_TOGETHER = 2_000_000

Finish = Callable[[Core, Lagrangian, Choice | None, Deadline], Outcome]


def solve_lagrangian(problem: Problem, gap: float, deadline: Deadline) -> Solution:
    """Exact within `gap`: dual bound and reduced-cost fixing, then labels, or HiGHS if there are too many."""
    return Search(Image(problem), problem, gap, deadline).solution(labels_then_ilp)


def minimize(core: Core, gap: float, deadline: Deadline) -> Outcome:
    """`shrink_and_finish` with the label search and HiGHS behind it."""
    return shrink_and_finish(core, gap, deadline, labels_then_ilp)


def labels_then_ilp(core: Core, bound: Lagrangian, incumbent: Choice | None, deadline: Deadline) -> Outcome:
    """Exhausts the core with labels; HiGHS takes over where they grow too many."""
    room = None if incumbent is None else bound.excess(core, incumbent)
    found = search_labels(core, bound, room, deadline)
    choice = _better(core, found.choice, incumbent)
    if not found.complete:
        by_program = solve_ilp_highs(core, bound, choice, deadline)
        return replace(by_program, why=TOO_MANY).noted("labels: too many, handed to HiGHS")
    if choice is None:
        return _labeled(Outcome(infeasible=True), core)
    return _labeled(Outcome(choice, core.total(choice) - found.slip), core)


def _labeled(outcome: Outcome, core: Core) -> Outcome:
    """What an exhausted label search found, with how it came about."""
    free = int((core.open.sum(axis=1) > 1).sum())
    return replace(
        outcome,
        log=("labels: exhausted",),
        method="labels",
        why=f"{free} groups stayed open: few enough to list",
    )


class Search:
    """One problem under its limits, from the float image to the certified answer.

    `visits` are the evaluations of the dual over the rows `binding`, for the next search over the image.
    """

    def __init__(
        self,
        image: Image,
        problem: Problem,
        gap: float,
        deadline: Deadline,
        known: tuple[tuple[int, ...], Sequence[Visit]] = ((), ()),
    ) -> None:
        self._image, self._problem, self._gap, self._deadline = image, problem, gap, deadline
        self._screen = Screen(image, [row.upper()[1] for row in problem.rows])
        self._log: list[str] = []
        self._lower: Fraction | None = None
        self.visits: list[Visit] = []
        self.binding = self._screen.binding
        if not self._screen.impossible:
            kept = known[1] if known[0] == self.binding else ()
            self.visits = climb(self._screen, deadline, [self._screen.anew(visit) for visit in kept])
            self._best = max(self.visits, key=lambda visit: visit.value)
            self._priced = Priced(self._screen, image, self._best)
            self._note(f"dual: {len(self.visits)} evaluations over {self._screen.rows} limits that can bind")

    def solution(self, finish: Finish) -> Solution:
        """The answer; `finish` exhausts what neither bound nor labels decide."""
        found = self._decided(finish)
        if not self._screen.impossible:
            found = replace(found, prices=prices_at(self._problem, self._screen, self._best.point))
        if found.choice is None or found.bound is None or found.status is Status.OPTIMAL:
            return found
        proven = answered(self._problem, found.choice, self._bounded(found.bound), self._gap)
        return replace(found, status=proven.status, bound=proven.bound, gap=proven.gap)

    def _decided(self, finish: Finish) -> Solution:
        if self._screen.impossible:
            return Solution(Status.INFEASIBLE, method="presolve", why=ALONE, log=(f"presolve: {ALONE}",))
        incumbent = self._start()
        if incumbent is not None:
            found = self._answer(incumbent)
            if found.status is Status.OPTIMAL or self._deadline.passed():
                if found.status is Status.OPTIMAL:
                    return self._told(found, "dual", "a choice met on the way is within the gap of its bound")
                return self._told(
                    found, "heuristic", "time limit: the best choice known, with the dual's bound"
                )
        if finish is labels_then_ilp:
            searched = self._grow(incumbent)
            if isinstance(searched, np.ndarray) and not self._repeated:
                searched = self._around(searched)
            if isinstance(searched, Solution):
                return searched
            incumbent = searched
            if incumbent is not None and self._repeated and len(self._image.groups) > MOST_OPEN:
                return self._told(self._answer(incumbent), "heuristic", TOO_MANY)
        return self._finished(incumbent, finish)

    def _start(self) -> Indices | None:
        """A feasible choice from those the dual met, led toward the one at its top."""
        likely = [visit.choice for visit in self.visits if (visit.slope <= NEARLY).all()]
        likely.sort(key=self._screen.cost_of)
        feasible = [choice for choice in likely if self._fits(choice)]
        for factor in BEYOND if not feasible else ():
            choice = self._screen.evaluate(self._best.point * (1 + factor)).choice
            if self._fits(choice):
                feasible.append(choice)
                break
        led = [self._screen.path(start, self._best.choice, self._best.point) for start in feasible[:POLISHED]]
        return min([*feasible[:1], *led], key=self._screen.cost_of, default=None)

    def _fits(self, choice: Indices) -> bool:
        return all(left >= 0 for left in self._screen.slack(choice))

    def _answer(self, choice: Indices) -> Solution:
        """A feasible choice with the bound of the dual."""
        picked = tuple(choice.tolist())
        objective = self._problem.objective(picked)
        sign = 1 if self._problem.direction == "min" else -1
        above = float(self._screen.unscaled(self._priced.excess(choice)))
        bound = np.nextafter(objective - sign * above, -sign * np.inf) if above else objective
        return answered(self._problem, picked, self._bounded(float(bound)), self._gap)

    def _bounded(self, bound: float) -> float:
        """The better of a bound and what label searches have proven, in the problem's direction."""
        if self._lower is None:
            return bound
        sign = 1 if self._problem.direction == "min" else -1
        proven = sign * float(np.nextafter(float(self._lower), -np.inf))
        return max(bound, proven) if sign > 0 else min(bound, proven)

    @cached_property
    def _repeated(self) -> bool:
        """Whether groups come in a few kinds of equal usage, under several limits."""
        groups = self._image.groups
        if len(self._screen.images) < 2:
            return False
        usage = [self._problem.rows[i].usage for i in self._screen.binding]
        return len(alike(usage, groups)) * REPEATED <= len(groups)

    def _grow(self, incumbent: Indices | None) -> Indices | Solution | None:
        """Labels over ever more groups: the answer, or the best choice met."""
        second = np.sort(self._priced.second[np.isfinite(self._priced.second)])
        done = 0.0
        if self._repeated:
            incumbent = self._first(incumbent)
        for size in (*CORES, *([len(self._image.groups)] if self._repeated else [])):
            room = math.inf if incumbent is None else self._priced.excess(incumbent)
            most = min(room, float(second[size]) if size < len(second) else math.inf)
            opened = self._priced.open(most)
            many = int((opened.sum(axis=1) > 1).sum()) > MOST_OPEN and not self._repeated
            if many or self._deadline.passed():
                break
            core, groups, bound = self._folded(opened)
            whole, below = self._whole(most, core, bound), self._whole(done, core, bound) or 0
            together = MOST_TOGETHER if self._repeated else MOST_LABELS
            found = search_labels(core, bound, whole, self._deadline, self._gap, below, together)
            lower = (Fraction(bound.lower + found.done, 1 << bound.bits) + core.offset) * core.unit
            self._lower = lower if self._lower is None else max(lower, self._lower)
            self._note(f"labels: {len(groups)} of {len(opened)} groups open")
            if found.complete and (found.choice is not None or math.isinf(most)):
                return self._exhausted(core, groups, found)
            if found.choice is not None:
                incumbent = self._better(incumbent, self._full(groups, found.choice))
                answer = self._answer(incumbent)
                if answer.status is Status.OPTIMAL:
                    return self._told(
                        answer, "labels", "a listed choice is within the gap of the dual's bound"
                    )
            if not found.complete:
                break
            if incumbent is not None and most < room / TIED and not self._repeated:
                around = self._around(incumbent)
                if isinstance(around, Solution):
                    return around
                incumbent = around
            done = most
        return incumbent

    def _first(self, incumbent: Indices | None) -> Indices | None:
        """A better choice by lists of all groups that are cut short."""
        room = math.inf if incumbent is None else self._priced.excess(incumbent)
        core, groups, bound = self._folded(self._priced.open(room))
        whole = self._whole(room, core, bound)
        found = search_labels(core, bound, whole, self._deadline, self._gap, most=FEWER)
        self._note(f"labels: cut short, {len(groups)} of {len(self._image.groups)} groups open")
        return (
            incumbent if found.choice is None else self._better(incumbent, self._full(groups, found.choice))
        )

    def _around(self, incumbent: Indices) -> Indices | Solution:
        """Labels over some groups at a time, the others as they are, while that finds better choices.

        The groups are taken evenly from all that the bound leaves open, each round other ones.
        """
        failed = 0
        for turn in range(TURNS):
            room = self._priced.excess(incumbent)
            opened = self._priced.open(room)
            free = np.flatnonzero(opened.sum(axis=1) > 1)
            stride = max(1, len(free) // NEIGHBORS)
            chosen = free[np.argsort(self._priced.second[free], kind="stable")][turn % stride :: stride]
            closed = np.ones(len(opened), dtype=bool)
            closed[chosen[:NEIGHBORS]] = False
            opened[closed] = False
            core, groups, bound = self._folded(opened, incumbent)
            within = bound.excess(core, tuple(incumbent[groups].tolist()))
            found = search_labels(core, bound, within, self._deadline, self._gap)
            changed = incumbent.copy()
            if found.choice is not None:
                changed[groups] = found.choice
            if found.choice is not None and self._priced.excess(changed) < room * (1 - LEAST_GAIN):
                incumbent, failed = changed, 0
                answer = self._answer(incumbent)
                if answer.status is Status.OPTIMAL:
                    return self._told(answer, "neighborhoods", NEAR_ENOUGH)
            else:
                failed += 1
            if failed == PATIENCE or stride == 1 or self._deadline.passed():
                break
        return incumbent

    def _finished(self, incumbent: Indices | None, finish: Finish) -> Solution:
        """The answer of `finish` over every cell that the incumbent leaves open."""
        room = math.inf if incumbent is None else self._priced.excess(incumbent)
        core, groups, _ = self._folded(self._priced.open(room))
        start = None if incumbent is None else tuple(incumbent[groups].tolist())
        outcome = shrink_and_finish(core, self._gap, self._deadline, finish, start)
        return self._solution(core, groups, outcome)

    def _folded(self, opened: Mask, fixed: Indices | None = None) -> tuple[Core, Indices, Lagrangian]:
        core, groups = fold(self._problem, opened, self._best.choice if fixed is None else fixed)
        return core, groups, lagrangian(core, self._screen.multipliers(self._best.point, core.unit))

    def _whole(self, most: float, core: Core, bound: Lagrangian) -> int | None:
        """A scaled excess in the units of an exact bound, rounded up; None for infinity."""
        if math.isinf(most):
            return None
        return math.ceil(self._screen.unscaled(most) / core.unit * (1 << bound.bits))

    def _better(self, first: Indices | None, second: Indices) -> Indices:
        if first is None or self._priced.excess(second) < self._priced.excess(first):
            return second
        return first

    def _full(self, groups: Indices, choice: Choice) -> Indices:
        full = self._best.choice.copy()
        full[groups] = choice
        return full

    def _exhausted(self, core: Core, groups: Indices, found: Searched) -> Solution:
        if found.choice is None:
            return self._solution(core, groups, _labeled(Outcome(infeasible=True), core))
        lower = core.total(found.choice) - found.slip
        return self._solution(core, groups, _labeled(Outcome(found.choice, lower), core))

    def _solution(self, core: Core, groups: Indices, outcome: Outcome) -> Solution:
        chosen = outcome.choice
        full = None if chosen is None else tuple(self._full(groups, chosen).tolist())
        found = solution_of(self._problem, core, outcome, self._gap, full)
        return replace(found, log=(*self._log, *found.log))

    def _told(self, solution: Solution, method: str, why: str) -> Solution:
        return replace(solution, method=method, why=why, log=(*self._log, f"{method}: {why}"))

    def _note(self, line: str) -> None:
        self._log.append(line)


@dataclass(frozen=True, eq=False)
class _Shrunk:
    bound: Lagrangian
    incumbent: Choice | None
    log: tuple[str, ...]


def shrink_and_finish(
    core: Core, gap: float, deadline: Deadline, finish: Finish, incumbent: Choice | None = None
) -> Outcome:
    """Presolve, then `finish` on what is left unless the gap is closed already. Closes cells of `core`.

    `incumbent` is a feasible choice of open cells.
    """
    if not len(core.open):
        return _only(core)
    cells = int(core.open.sum())
    if not shrink_by_limits(core):
        return Outcome(infeasible=True, log=(f"presolve: {ALONE}",), method="presolve", why=ALONE)
    drop_loose_rows(core)
    drop_dominated(core)
    shrunk = _shrink(core, gap, deadline, incumbent)
    if isinstance(shrunk, Outcome):
        return shrunk
    left = int((core.open.sum(axis=1) > 1).sum())
    note = (
        f"presolve: {int(core.open.sum())} of {cells} cells left, {left} of {len(core.open)} groups undecided"
    )
    lower = lower_bound(shrunk.bound)
    if deadline.passed():
        log = (*shrunk.log, note, "time limit: presolve only")
        why = "time limit: the best choice known, with the dual's bound"
        return Outcome(shrunk.incumbent, lower, log=log, method="heuristic", why=why)
    finished = finish(core, shrunk.bound, shrunk.incumbent, deadline)
    if finished.lower is None or finished.lower < lower:
        finished = replace(finished, lower=lower)
    finished = _certify(core, shrunk.bound, finished, gap, deadline)
    return replace(finished, log=(*shrunk.log, note, *finished.log))


def _only(core: Core) -> Outcome:
    """The one choice of a core without groups."""
    if core.feasible(()):
        return Outcome((), Fraction(0), proven=True, method="dual", why="its bound leaves one choice")
    return Outcome(infeasible=True, method="dual", why="its bound leaves one choice, which breaks a limit")


def _certify(core: Core, bound: Lagrangian, finished: Outcome, gap: float, deadline: Deadline) -> Outcome:
    """A last label search where a backend's tolerance leaves the gap open: it counts in exact integers."""
    choice, lower = finished.choice, finished.lower
    if finished.proven or choice is None or lower is None or _within(core, choice, lower, gap):
        return finished
    fix_by_bound(core, bound, choice)
    found = search_labels(core, bound, bound.excess(core, choice), deadline, gap)
    best = core.best([each for each in (found.choice, choice) if each is not None])
    if not found.complete or best is None:
        return replace(finished, choice=best)
    certified = replace(finished, choice=best, lower=max(lower, core.total(best) - found.slip))
    return certified.noted("labels: certified")


def _shrink(core: Core, gap: float, deadline: Deadline, incumbent: Choice | None = None) -> _Shrunk | Outcome:
    """Rounds of dual, incumbent and fixing while they rule cells out."""
    log: tuple[str, ...] = ()
    for _ in range(ROUNDS):
        before = int(core.open.sum())
        dual = solve_dual(core, deadline)
        bound = max((lagrangian(core, dual.multipliers), lagrangian(core, _zeros(core))), key=lower_bound)
        if lower_bound(bound) > int(most_open(core.cost, core.open).sum()):
            why = "its bound passes every choice"
            return Outcome(infeasible=True, log=(*log, f"dual: {why}"), method="dual", why=why)
        incumbent = _better(core, incumbent, _incumbent(core, dual.choices, deadline))
        lower = lower_bound(bound) + core.offset
        log = (*log, f"dual: {len(dual.choices)} choices, bound {float(lower * core.unit):.12g}")
        if incumbent is not None:
            if _within(core, incumbent, lower_bound(bound), gap):
                why = "a choice met on the way is within the gap of its bound"
                return Outcome(incumbent, lower_bound(bound), log=log, method="dual", why=why)
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
    size = max(least, abs(cost + core.offset))
    return cost - lower <= Fraction(gap) * size
