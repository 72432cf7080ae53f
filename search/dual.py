"""The Lagrangian dual over all limits at once, by Kelley's cutting planes (J. E. Kelley, 1960).

The dual function is concave and piecewise linear in the multipliers. Each evaluation gives a choice, a
bound and a cut; a small linear program over the cuts proposes the next multipliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from search.backends import highspy
from search.core import Core, least_open, unit_floats
from search.deadline import Deadline
from search.problem import Choice

BOX = 1e6
CLOSE = 1e-10
LEAST_ROUNDS = 15


@dataclass(frozen=True)
class Dual:
    """The best multipliers found (cost units per usage unit, one per row) and the choices met on the way."""

    multipliers: tuple[Fraction, ...]
    choices: tuple[Choice, ...]


def solve_dual(core: Core, deadline: Deadline) -> Dual:
    """Multipliers that (nearly) maximize the Lagrangian bound. Any multipliers give a valid bound."""
    scaled = _Scaled(core)
    master = _Master(len(core.usage))
    best, best_value, point = np.zeros(len(core.usage)), -np.inf, np.zeros(len(core.usage))
    choices: dict[Choice, None] = {}
    for _ in range(60 + 40 * len(core.usage)):
        value, slope, choice = scaled.evaluate(point)
        choices[choice] = None
        if value > best_value:
            best, best_value = point, value
        if best_value > scaled.ceiling or (deadline.passed() and len(choices) > LEAST_ROUNDS):
            break
        point, promised = master.next(value, slope, point)
        if promised - best_value <= CLOSE * max(1.0, abs(best_value)):
            break
    pairs = zip(best, scaled.per_row, strict=True)
    return Dual(tuple(Fraction(float(value)) * scale for value, scale in pairs), tuple(choices))


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
        self.ceiling = float(self._cost.max(axis=1).sum()) * (1 + 1e-9)

    def evaluate(self, point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], Choice]:
        priced = self._cost.copy()
        for multiplier, usage in zip(point, self._usage, strict=True):
            priced += multiplier * usage
        priced[self._closed] = np.inf
        chosen = priced.argmin(axis=1)
        used = np.array([usage[self._groups, chosen].sum() for usage in self._usage])
        slope = used - self._room
        value = float(self._cost[self._groups, chosen].sum() + slope @ point)
        return value, slope, tuple(int(scheme) for scheme in chosen)


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

    def next(
        self, value: float, slope: NDArray[np.float64], point: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], float]:
        coefficients = np.concatenate([[1.0], -slope])
        right = value - float(slope @ point)
        self._program.addRow(-highspy.kHighsInf, right, len(self._columns), self._columns, coefficients)
        self._program.run()
        solution = np.array(self._program.getSolution().col_value)
        if self._program.getModelStatus() != highspy.HighsModelStatus.kOptimal or not len(solution):
            return point, -np.inf
        return np.clip(solution[1:], 0.0, BOX), float(solution[0])
