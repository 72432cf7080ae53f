"""Why nothing fits: a set of limits and restrictions that cannot hold together, of which none is idle."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np

from search.catalog import AUTO, SOLVERS
from search.compile import Compiled
from search.deadline import Deadline
from search.problem import Problem, Row, Status, named_rows
from search.question import Question, Restriction
from search.solve import least_budget, solve

CONFLICT_SECONDS = 5.0
MOST_SUBSETS = 200
"""Smaller sets than the one found are looked for while there are no more of them than this."""
Member = str | Restriction
"""A limit by its name, or a restriction."""


@dataclass(frozen=True)
class Relaxed:
    """A member of a conflict and what giving way there would buy, everything else kept.

    `fits`: whether a plan fits then; None where the time did not suffice. Of a limit: its value, and the
    least (for ">=" the largest) value at which one fits, in the resource's unit. `objective` is the best one
    then.
    """

    kind: str
    name: str
    fits: bool | None = None
    limit: Fraction | None = None
    least: Fraction | None = None
    objective: float | None = None


@dataclass(frozen=True)
class Conflict:
    """Limits and restrictions that no plan keeps all.

    `irreducible`: without any one of them the others can be kept, proven. `smallest`: no conflict has fewer
    members, proven.
    """

    members: tuple[Relaxed, ...]
    irreducible: bool
    smallest: bool


def conflict_of(
    question: Question, least: Mapping[str, Fraction] | None = None, seconds: float = CONFLICT_SECONDS
) -> Conflict | None:
    """The conflict of a question without an answer; None if it has one, or if time is up before it is known.

    `least` are its least budgets, where they are known already.
    """
    filter_ = _Filter(question, Deadline.after(seconds))
    members: list[Member] = [*filter_.limits, *question.restrictions]
    if filter_.fits(members) or filter_.unsure:
        return None
    found = filter_.reduce([], members, background_changed=False)
    smaller = filter_.smaller(members, len(found))
    compiled = question.compiled()
    if least is None:
        least = least_budget(compiled.problem)
    return Conflict(
        tuple(_relaxed(question, compiled, least, member, filter_.deadline) for member in smaller or found),
        irreducible=not filter_.unsure,
        smallest=filter_.searched and not filter_.unsure,
    )


class _Filter:
    """Asks whether some of the limits and restrictions can hold together, each set once."""

    def __init__(self, question: Question, deadline: Deadline) -> None:
        self._question = question
        self._known: dict[frozenset[Member], bool] = {}
        self.deadline = deadline
        self.limits = tuple(named_rows(question.compiled().problem))
        self.unsure = False
        self.searched = False

    def fits(self, members: Collection[Member]) -> bool:
        """Whether a plan keeps these; what cannot be told in time counts as yes."""
        key = frozenset(members)
        if key not in self._known:
            self._known[key] = self._decide(members)
        return self._known[key]

    def reduce(
        self, background: list[Member], candidates: list[Member], *, background_changed: bool
    ) -> list[Member]:
        """Those of the candidates that a conflict with the background needs, none idle (U. Junker,
        "QuickXplain", 2004): the deletion filter, by halves.
        """
        if background_changed and not self.fits(background):
            return []
        if len(candidates) < 2:
            return candidates
        half = len(candidates) // 2
        first, second = candidates[:half], candidates[half:]
        right = self.reduce([*background, *first], second, background_changed=True)
        left = self.reduce([*background, *right], first, background_changed=bool(right))
        return [*left, *right]

    def smaller(self, members: Sequence[Member], size: int) -> list[Member] | None:
        """The first conflict of fewer than `size` members, by size; `searched` says if all were looked at."""
        for count in range(size):
            if comb(len(members), count) > MOST_SUBSETS or self.deadline.passed():
                return None
            for subset in combinations(members, count):
                if not self.fits(subset):
                    self.searched = True
                    return list(subset)
        self.searched = True
        return None

    def _decide(self, members: Collection[Member]) -> bool:
        if self.deadline.passed():
            self.unsure = True
            return True
        kept = [member for member in members if isinstance(member, Restriction)]
        dropped = [one for one in self._question.restrictions if one not in kept]
        problem = self._question.compiled(dropped).problem
        rows = tuple(row for name, row in named_rows(problem).items() if name in members)
        answer = feasible(replace(problem, rows=rows), self.deadline)
        self.unsure |= answer is None
        return answer is not False


def feasible(problem: Problem, deadline: Deadline) -> bool | None:
    """Whether any choice keeps all limits; None if that is not known in time."""
    if not problem.offered.any(axis=1).all():
        return False
    if any(_out_of_reach(problem, row) for row in problem.rows):
        return False
    if len(problem.rows) < 2:
        return True
    nothing = replace(problem, costs=np.where(problem.offered, 0.0, np.nan), direction="min")
    status = SOLVERS[AUTO].solve(nothing, 0.0, deadline).status
    return None if status is Status.UNKNOWN else status is not Status.INFEASIBLE


def _out_of_reach(problem: Problem, row: Row) -> bool:
    usage, limit = row.upper()
    return int(np.where(problem.offered, usage, usage.max() + 1).min(axis=1).sum()) > limit


def _relaxed(
    question: Question, compiled: Compiled, least: Mapping[str, Fraction], member: Member, deadline: Deadline
) -> Relaxed:
    if isinstance(member, Restriction):
        if deadline.passed():
            return Relaxed(member.kind, member.name)
        fits, objective = _best(question.compiled([member]).problem, deadline)
        return Relaxed(member.kind, member.name, fits, objective=objective)
    row = named_rows(compiled.problem)[member]
    stated = row.limit * row.unit
    if member not in least:
        return Relaxed("limit", member, False, stated)
    moved = replace(row, limit=int(least[member] / row.unit))
    rows = tuple(moved if other is row else other for other in compiled.problem.rows)
    fits, objective = _best(replace(compiled.problem, rows=rows), deadline)
    return Relaxed("limit", member, fits, stated, least[member] if fits else None, objective)


def _best(problem: Problem, deadline: Deadline) -> tuple[bool | None, float | None]:
    """Whether something fits, and the best objective."""
    if deadline.passed():
        return None, None
    fits = feasible(problem, deadline)
    if not fits:
        return fits, None
    return True, solve(problem, gap=1e-6, time_limit=max(0.1, deadline.left())).objective
