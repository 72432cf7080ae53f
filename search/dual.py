"""The Lagrangian dual over all limits at once: tangents for one limit, Kelley's cutting planes for several.

The dual function is concave and piecewise linear in the multipliers (J. E. Kelley, 1960). Each evaluation
gives a choice, a bound and a cut; the top of the cuts proposes the next multipliers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from search.backends import highspy
from search.core import Core, least_open, unit_floats
from search.deadline import Deadline
from search.problem import Choice

BOX = 1e6
CLOSE = 1e-10
LEAST_ROUNDS = 15

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Visit:
    """The dual at one point: the cheapest choice there, its cost and usage, and the room of the limits."""

    point: Floats
    choice: NDArray[np.int64]
    cost: float
    used: Floats
    room: Floats

    @cached_property
    def slope(self) -> Floats:
        """Usage less room, per row."""
        return self.used - self.room

    @cached_property
    def value(self) -> float:
        """The dual function: cost and priced slope."""
        return self.cost + float(self.slope @ self.point)


class Face(Protocol):
    """A dual function in floats, costs and usages of the order of 1. No choice costs more than `ceiling`."""

    rows: int
    ceiling: float

    def evaluate(self, point: Floats) -> Visit:
        """The dual at a point."""


@dataclass(frozen=True)
class Dual:
    """The best multipliers found (cost units per usage unit, one per row) and the choices met on the way."""

    multipliers: tuple[Fraction, ...]
    choices: tuple[Choice, ...]


def solve_dual(core: Core, deadline: Deadline) -> Dual:
    """Multipliers that (nearly) maximize the Lagrangian bound. Any multipliers give a valid bound."""
    scaled = _Scaled(core)
    visits = climb(scaled, deadline)
    best = max(visits, key=lambda visit: visit.value)
    pairs = zip(best.point, scaled.per_row, strict=True)
    choices = dict.fromkeys(tuple(visit.choice.tolist()) for visit in visits)
    return Dual(tuple(Fraction(float(value)) * scale for value, scale in pairs), tuple(choices))


def climb(face: Face, deadline: Deadline, known: Sequence[Visit] = ()) -> list[Visit]:
    """Evaluates until nothing better is promised; the visits in order, at least one.

    `known` are visits of the same function (from other limits, with the slopes of these): they save
    evaluations.
    """
    if face.rows == 0:
        return [face.evaluate(np.zeros(0))]
    return _bracket(face, deadline, known) if face.rows == 1 else _cut(face, deadline, known)


def _bracket(face: Face, deadline: Deadline, known: Sequence[Visit]) -> list[Visit]:
    """One limit: the two tangents around the top meet at the next point."""
    low = max((visit for visit in known if visit.slope[0] > 0), key=_at, default=None)
    high = min((visit for visit in known if visit.slope[0] <= 0), key=_at, default=None)
    visits: list[Visit] = []
    if low is None and (high is None or _at(high) > 0):
        visits.append(face.evaluate(np.zeros(1)))
        low, high = (visits[-1], high) if visits[-1].slope[0] > 0 else (None, visits[-1])
    while high is None and low is not None:
        visits.append(face.evaluate(np.array([max(1.0, 8 * _at(low))])))
        low, high = (visits[-1], None) if visits[-1].slope[0] > 0 else (low, visits[-1])
        if _at(visits[-1]) > BOX or visits[-1].value > face.ceiling:
            return visits
    while low is not None and high is not None and not (deadline.passed() and len(visits) > LEAST_ROUNDS):
        meet = _meet(low, high)
        if meet is None:
            break
        visits.append(face.evaluate(np.array([meet])))
        promised = low.value + float(low.slope[0]) * (meet - _at(low))
        if promised - visits[-1].value <= CLOSE * max(1.0, abs(visits[-1].value)):
            break
        low, high = (visits[-1], high) if visits[-1].slope[0] > 0 else (low, visits[-1])
    return [*visits, *(end for end in (low, high) if end is not None)]


def _at(visit: Visit) -> float:
    return float(visit.point[0])


def _meet(low: Visit, high: Visit) -> float | None:
    """Where two tangents cross, strictly between their points; None if they do not."""
    steep, flat = float(low.slope[0]), float(high.slope[0])
    level = high.value - low.value + steep * _at(low) - flat * _at(high)
    meet = level / (steep - flat)
    return meet if _at(low) < meet < _at(high) else None


def _cut(face: Face, deadline: Deadline, known: Sequence[Visit]) -> list[Visit]:
    """Several limits: Kelley's method, the linear program over the cuts solved by HiGHS."""
    master = _Master(face.rows)
    best_value, point = -np.inf, np.zeros(face.rows)
    visits: list[Visit] = []
    if known:
        master.add(known)
        point, _ = master.top(point)
    for _ in range(60 + 40 * face.rows):
        visits.append(face.evaluate(point))
        best_value = max(best_value, visits[-1].value)
        if best_value > face.ceiling or (deadline.passed() and len(visits) > LEAST_ROUNDS):
            break
        master.add(visits[-1:])
        point, promised = master.top(point)
        again = bool((point == visits[-1].point).all())
        if again or promised - best_value <= CLOSE * max(1.0, abs(best_value)):
            break
    return visits


class _Scaled:
    """The core in floats: every cost and every usage lies between 0 and 1."""

    def __init__(self, core: Core) -> None:
        self._closed = ~core.open
        self._cost, cost_unit = unit_floats(core.cost, core.open)
        rows = [unit_floats(usage, core.open) for usage in core.usage]
        self._usage = [row for row, _ in rows]
        base = [int(least_open(usage, core.open).sum()) for usage in core.usage]
        pairs = zip(core.limit, base, rows, strict=True)
        self._room = np.array([(limit - least) / unit for limit, least, (_, unit) in pairs])
        self._groups = np.arange(core.cost.shape[0])
        self.per_row = tuple(Fraction(cost_unit, unit) for _, unit in rows)
        self.rows = len(rows)
        self.ceiling = float(self._cost.max(axis=1).sum()) * (1 + 1e-9)

    def evaluate(self, point: Floats) -> Visit:
        priced = self._cost.copy()
        for multiplier, usage in zip(point, self._usage, strict=True):
            priced += multiplier * usage
        priced[self._closed] = np.inf
        chosen = priced.argmin(axis=1)
        used = np.array([usage[self._groups, chosen].sum() for usage in self._usage])
        return Visit(point, chosen, float(self._cost[self._groups, chosen].sum()), used, self._room)


class _Master:
    """Maximize t under the cuts t <= value + slope . (multipliers - point), multipliers from 0 to BOX."""

    def __init__(self, rows: int) -> None:
        self._program = highspy.Highs()
        self._program.setOptionValue("output_flag", False)
        self._program.setOptionValue("threads", 1)
        self._program.addVar(-highspy.kHighsInf, highspy.kHighsInf)
        self._program.changeColCost(0, -1.0)
        for _ in range(rows):
            self._program.addVar(0.0, BOX)
        self._columns = np.arange(rows + 1, dtype=np.int32)

    def add(self, visits: Sequence[Visit]) -> None:
        for visit in visits:
            coefficients = np.concatenate([[1.0], -visit.slope])
            right = visit.value - float(visit.slope @ visit.point)
            width = len(self._columns)
            self._program.addRow(-highspy.kHighsInf, right, width, self._columns, coefficients)

    def top(self, point: Floats) -> tuple[Floats, float]:
        """The highest point of the cuts and its height; `point` and -infinity where there is none."""
        self._program.run()
        solution = np.array(self._program.getSolution().col_value)
        if self._program.getModelStatus() != highspy.HighsModelStatus.kOptimal or not len(solution):
            return point, -np.inf
        return np.clip(solution[1:], 0.0, BOX), float(solution[0])
