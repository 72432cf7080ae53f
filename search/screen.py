"""The float image of a problem: dual, incumbents and reduced-cost fixing at full size, with error bounds.

Costs and usages are counted from the least of their group and scaled by powers of two. Such a difference,
a product and a sum of what is not negative each lose at most one rounding, so a price is known within a
factor of 1 +- `margin`; what is ruled out here is ruled out in exact arithmetic too. Arrays have shape
(schemes, groups): vectors run over the groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.core import Mask
from search.dual import Visit
from search.problem import Problem, Row

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
EPSILON = 2.0**-52
BEYOND = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
FILLS = 30
PART = 4096


@dataclass(frozen=True, eq=False)
class RowImage:
    """One limit as "at most": exact usage (schemes, groups), least per group, and usage above it, scaled."""

    usage: NDArray[Any]
    lowest: int
    highest: int
    above: Floats
    scale: int


class Image:
    """What of a problem depends on costs and usages only. `cost` is infinite where a cell is closed.

    No choice costs more than `ceiling` above the cheapest cells.
    """

    def __init__(self, problem: Problem) -> None:
        sign = 1.0 if problem.direction == "min" else -1.0
        self.problem = problem
        self.open = np.ascontiguousarray(problem.offered.T)
        self.offered = bool(self.open.any(axis=0).all())
        self.groups = np.arange(self.open.shape[1])
        costs = np.where(self.open, sign * problem.costs.T, np.inf)
        least = costs.min(axis=0)
        with np.errstate(invalid="ignore", over="ignore"):
            above = np.where(self.open, costs * 0.5 - least * 0.5, np.inf)
        self.cost_scale = _exponent(np.where(self.open, above, 0.0).max()) + 1
        self.cost = np.ldexp(above, 1 - self.cost_scale)
        self.ceiling = float(np.where(self.open, self.cost, 0.0).max(axis=0).sum()) * (1 + 1e-9)
        self.rows = tuple(self._row(row) for row in problem.rows) if self.offered else ()

    def _row(self, row: Row) -> RowImage:
        usage = np.ascontiguousarray(row.upper()[0].T)
        least = np.where(self.open, usage, usage.max() + 1).min(axis=0)
        most = np.where(self.open, usage, usage.min() - 1).max(axis=0)
        above = np.where(self.open, usage - least, 0).astype(np.float64)
        scale = _exponent(above.max())
        return RowImage(usage, int(least.sum()), int(most.sum()), np.ldexp(above, -scale), scale)


def _exponent(value: float) -> int:
    """The power of two just above a number."""
    return int(np.frexp(value)[1])


class Screen:
    """An image under limits: the dual function of the limits that can bind.

    `limits` are in "at most" form, one per row of the problem. `images` are the rows that can bind.
    """

    def __init__(self, image: Image, limits: Sequence[int]) -> None:
        self._image = image
        pairs = list(zip(image.rows, limits, strict=True)) if image.offered else []
        self.impossible = not image.offered or any(limit < row.lowest for row, limit in pairs)
        self.binding = tuple(i for i, (row, limit) in enumerate(pairs) if limit < row.highest)
        self.images = tuple(image.rows[i] for i in self.binding)
        self._limits = tuple(limits[i] for i in self.binding)
        self._room = np.array([_scaled(limit - row.lowest, row.scale) for row, limit in self._bound()])
        self.rows = len(self.images)
        self.ceiling = image.ceiling
        self.margin = (self.rows + 6) * EPSILON
        self._total, self._extra = (
            np.empty((len(image.cost), min(PART, len(image.groups)))) for _ in range(2)
        )

    def _bound(self) -> list[tuple[RowImage, int]]:
        return list(zip(self.images, self._limits, strict=True))

    def priced(self, point: Floats, part: slice) -> Floats:
        """Cost and priced usage of the cells of some groups, infinite where closed; until the next call."""
        cost = self._image.cost[:, part]
        total, extra = self._total[:, : cost.shape[1]], self._extra[:, : cost.shape[1]]
        np.copyto(total, cost)
        for multiplier, row in zip(point, self.images, strict=True):
            if multiplier:
                np.multiply(row.above[:, part], multiplier, out=extra)
                total += extra
        return total

    def evaluate(self, point: Floats) -> Visit:
        """The dual at a point."""
        choice = np.empty(len(self._image.groups), dtype=np.int64)
        for begin in range(0, len(choice), PART):
            part = slice(begin, begin + PART)
            choice[part] = cheapest(self.priced(point, part))
        groups = self._image.groups
        used = np.array([row.above[choice, groups].sum() for row in self.images])
        return Visit(point, choice, self.cost_of(choice), used, self._room)

    def anew(self, visit: Visit) -> Visit:
        """A visit of the same image under these limits."""
        return Visit(visit.point, visit.choice, visit.cost, visit.used, self._room)

    def slack(self, choice: Indices) -> list[int]:
        """What is left of each limit that can bind, exact; negative where it is broken."""
        groups = self._image.groups
        return [limit - int(row.usage[choice, groups].sum()) for row, limit in self._bound()]

    def multipliers(self, point: Floats, unit: Fraction) -> tuple[Fraction, ...]:
        """A point as exact multipliers in `unit` of cost per usage, one per row of the problem."""
        found = [Fraction(0)] * len(self._image.rows)
        for i, row, value in zip(self.binding, self.images, point, strict=True):
            found[i] = Fraction(float(value)) * _power(self._image.cost_scale - row.scale) / unit
        return tuple(found)

    def cost_of(self, choice: Indices) -> float:
        """Summed cost above the cheapest cells, scaled; not exact."""
        return float(self._image.cost[choice, self._image.groups].sum())

    def unscaled(self, value: float) -> Fraction:
        """A scaled cost in the problem's own unit."""
        return Fraction(value) * _power(self._image.cost_scale)

    def _at(self, point: Floats, choice: Indices, groups: Indices) -> Floats:
        """The priced cells of a choice in some groups."""
        cells = choice[groups], groups
        total = self._image.cost[cells]
        for multiplier, row in zip(point, self.images, strict=True):
            total = total + multiplier * row.above[cells]
        return np.asarray(total)

    def path(self, start: Indices, goal: Indices, point: Floats) -> Indices:
        """From a feasible choice toward another one, group by group while the limits hold.

        Changes that save most at `point` come first; those that do not fit are passed over.
        """
        current = start.copy()
        left = np.flatnonzero(start != goal)
        saved = self._at(point, start, left) - self._at(point, goal, left)
        left = left[np.argsort(-saved, kind="stable")]
        cost = self._image.cost
        for _ in range(FILLS):
            slack = self.slack(current)
            change = [row.usage[goal[left], left] - row.usage[current[left], left] for row in self.images]
            better = cost[goal[left], left] - cost[current[left], left]
            fits = np.ones(len(left), dtype=bool)
            for used, room in zip(change, slack, strict=True):
                fits &= np.asarray(used <= room, dtype=bool)
            fits &= (better < 0) | _saves(change, len(left))
            left, better = left[fits], better[fits]
            if not len(left):
                break
            holds = np.ones(len(left), dtype=bool)
            for used, room in zip(change, slack, strict=True):
                holds &= np.asarray(np.cumsum(used[fits]) <= room, dtype=bool)
            gained = np.where(holds, np.cumsum(better), np.inf)
            stop = int(gained.argmin()) + 1
            current[left[:stop]] = goal[left[:stop]]
            left = left[stop + 1 :] if stop < len(left) else left[:0]
        return current


def _saves(change: list[NDArray[Any]], count: int) -> Mask:
    saves = np.zeros(count, dtype=bool)
    for used in change:
        saves |= np.asarray(used < 0, dtype=bool)
    return saves


class Priced:
    """Reduced costs at one point with their error bounds, scaled; shape (schemes, groups)."""

    def __init__(self, screen: Screen, image: Image, visit: Visit) -> None:
        self._screen, self._image, self._visit = screen, image, visit
        shape = image.cost.shape
        self.low, self._high = np.empty(shape), np.empty(shape)
        self.second, self._least = np.empty(shape[1]), np.empty(shape[1])
        self._certain = np.empty(shape[1], dtype=bool)
        for begin in range(0, shape[1], PART):
            self._bound(slice(begin, begin + PART))

    def _bound(self, part: slice) -> None:
        priced = self._screen.priced(self._visit.point, part)
        best = self._visit.choice[part]
        groups = np.arange(len(best))
        low, high = priced * (1 - self._screen.margin), priced * (1 + self._screen.margin)
        top, bottom = high[best, groups], low[best, groups]
        self.low[:, part], self._high[:, part] = np.maximum(low - top, 0.0) * (1 - EPSILON), high
        low[best, groups] = np.inf
        floor = low.min(axis=0)
        self.second[part] = np.maximum(floor - top, 0.0) * (1 - EPSILON)
        self._least[part], self._certain[part] = np.minimum(floor, bottom), floor >= top

    def excess(self, choice: Indices) -> float:
        """At most so far is a feasible choice above the bound."""
        above = self._high[choice, self._image.groups] - self._least
        above[self._certain & (choice == self._visit.choice)] = 0.0
        slack = self._screen.slack(choice)
        priced = [
            float(value) * _scaled(room, row.scale)
            for value, room, row in zip(self._visit.point, slack, self._screen.images, strict=True)
        ]
        return math.fsum([*above.tolist(), *priced]) * (1 + 4 * EPSILON)

    def open(self, most: float) -> Mask:
        """Cells, shape (groups, schemes), that choices of an excess up to `most` may have."""
        mask: Mask = (self.low <= most) & self._image.open
        return mask.T


def _scaled(value: int, scale: int) -> float:
    """value / 2**scale, rounded."""
    return float(value * _power(-scale))


def _power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def cheapest(priced: Floats) -> Indices:
    """The first cheapest scheme of every group, priced having shape (schemes, groups)."""
    least, chosen = priced[0].copy(), np.zeros(priced.shape[1], dtype=np.int64)
    for scheme in range(1, len(priced)):
        np.putmask(chosen, priced[scheme] < least, scheme)
        np.minimum(least, priced[scheme], out=least)
    return chosen
