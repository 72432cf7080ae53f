"""One table, many budgets: what depends on costs and usages is done once, what depends on limits per solve.

Stretches of a frontier are solved this way (`search.frontier.between`), and it is the way for programs that
embed the search and sweep budgets. A single re-solve of the service is not: evaluations of the dual that are
kept from earlier budgets give the same objective, but where plans tie another one of them, and other last
digits of its certificate, so a plan would depend on which budgets were asked for before it. What the service
reuses of a job are its inputs, with the exact integers of the table (`ScoreTable.whole`).

>>> import numpy as np
>>> from search.problem import Problem, Row
>>> row = Row("bytes", "<=", np.array([[1, 2], [1, 2]]), 3)
>>> prepared = Prepared(Problem(np.array([[3.0, 1.0], [2.0, 0.5]]), (row,)))
>>> [prepared.solve([limit]).objective for limit in (2, 3, 4)]
[5.0, 3.0, 1.5]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from search.deadline import Deadline
from search.dual import Visit
from search.problem import DEFAULT_GAP, Problem, ProblemError, Solution
from search.screen import Image
from search.solve import certified
from search.solvers.lagrangian import Search, labels_then_ilp

MOST_CELLS = 4_000_000
MOST_VISITS = 40


class Prepared:
    """A problem whose limits change: scaled costs and usages, and evaluations of the dual, are kept.

    Not for several threads at once: answers are the same, but what is kept is not locked.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._image = Image(problem)
        self._known: list[Visit] = []
        self._binding: tuple[int, ...] = ()

    def solve(
        self,
        limits: Sequence[int] | None = None,
        *,
        gap: float = DEFAULT_GAP,
        time_limit: float | None = None,
    ) -> Solution:
        """The solution under other limits, one integer per row in the row's own units (None: as they are).

        The same answers as those of `search.solve.solve`, which says what raises.
        """
        problem = self.problem if limits is None else self._under(limits)
        return certified(problem, "lagrangian", self._search, gap, time_limit)

    def attempt(self, limits: Sequence[int], gap: float, deadline: Deadline) -> Solution:
        """The same without the explanation of "infeasible", for steps of a longer search."""
        return self._search(self._under(limits), gap, deadline)

    def _under(self, limits: Sequence[int]) -> Problem:
        rows = self.problem.rows
        if len(limits) != len(rows):
            raise ProblemError(f"Limits must be given for each of {len(rows)} rows. Got {len(limits)}.")
        changed = tuple(replace(row, limit=int(limit)) for row, limit in zip(rows, limits, strict=True))
        return self.problem.under(changed)

    def _search(self, problem: Problem, gap: float, deadline: Deadline) -> Solution:
        search = Search(self._image, problem, gap, deadline, (self._binding, self._known))
        solution = search.solution(labels_then_ilp)
        if search.visits:
            room = max(2, MOST_CELLS // len(problem.costs))
            same = self._known if search.binding == self._binding else []
            merged = {visit.point.tobytes(): visit for visit in (*same, *search.visits)}
            self._known = list(merged.values())[-min(MOST_VISITS, room) :]
            self._binding = search.binding
        return solution
