"""Exhaustive search of what reduced costs leave open, group by group, many partial choices at a time.

A label is a partial choice: what it has used of every row, and its excess so far over the Lagrangian bound.
The excess of a complete choice is the sum of its reduced costs plus multipliers times slacks; both only
grow. Labels are dropped when no completion keeps the limits, when the excess passes a threshold, or when
another label is no worse in everything (D. Pisinger, "A minimal algorithm for the multiple-choice knapsack
problem", 1995, for one limit). The threshold is raised from small values, so the first threshold with an
answer proves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.core import Core, Lagrangian, least_open, most_open
from search.deadline import Deadline
from search.problem import Choice

MOST_LABELS = 400_000
PAIRWISE = 1_500
STEP = 4.0
TIE = 1e-12


@dataclass(frozen=True)
class Searched:
    """`complete`: every choice with an excess up to the threshold was considered; `choice`: the best."""

    complete: bool
    choice: Choice | None


def search_labels(core: Core, bound: Lagrangian, incumbent: Choice | None, deadline: Deadline) -> Searched:
    """The cheapest feasible choice better than the incumbent (if any), or proof that there is none."""
    layers = _Layers(core, bound, incumbent)
    for threshold in layers.thresholds():
        found = layers.run(threshold, deadline)
        if not found.complete or found.choice is not None:
            return found
    return Searched(True, None)


@dataclass(frozen=True, eq=False)
class _Group:
    index: int
    schemes: NDArray[np.int64]
    reduced: NDArray[np.float64]
    usage: NDArray[Any]


class _Layers:
    """The open groups in search order, with what the groups after each can still use."""

    def __init__(self, core: Core, bound: Lagrangian, incumbent: Choice | None) -> None:
        self._core = core
        self._bound = bound
        self.scale = _scale(core, bound, incumbent)
        self._bounded = incumbent is not None
        reduced = (bound.reduced / self.scale).astype(np.float64)
        self._price = np.array([float(Fraction(value, self.scale)) for value in bound.multipliers])
        self._base = tuple(int(scheme) for scheme in core.open.argmax(axis=1))
        self._fixed = core.open.sum(axis=1) == 1
        free = np.flatnonzero(~self._fixed)
        self._dtype = object if any(rows.dtype == object for rows in core.usage) else np.int64
        self._room = self._array([limit - used for limit, used in self._fixed_use()])
        self._groups = [self._group(int(index), reduced) for index in self._order(free)]
        self._tails = self._completions()

    def thresholds(self) -> list[float]:
        second = sorted(float(group.reduced[group.reduced > 0].min(initial=np.inf)) for group in self._groups)
        finite = [value for value in second if np.isfinite(value)]
        last = 1.0 if self._bounded else np.inf
        value = finite[min(len(finite) - 1, 6)] * 2 if finite else last
        values = []
        while value < min(last, 1e3):
            values.append(value)
            value *= STEP
        return [*values, last]

    def run(self, threshold: float, deadline: Deadline) -> Searched:
        excess, used = np.zeros(1), np.zeros((1, len(self._core.usage)), dtype=self._dtype)
        history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for group, (least, most) in zip(self._groups, self._tails, strict=True):
            cells = np.flatnonzero(group.reduced <= threshold * (1 + TIE))
            if len(excess) * len(cells) > MOST_LABELS * 4 or deadline.passed():
                return Searched(False, None)
            parent, cell = np.divmod(np.arange(len(excess) * len(cells)), len(cells))
            cell = cells[cell]
            excess, used = excess[parent] + group.reduced[cell], used[parent] + group.usage[cell]
            kept = self._promising(excess, used, least, most, threshold)
            if not len(kept):
                return Searched(True, None)
            kept = kept[self._undominated(excess[kept], used[kept])]
            if len(kept) > MOST_LABELS:
                return Searched(False, None)
            history.append((parent[kept], group.schemes[cell[kept]]))
            excess, used = excess[kept], used[kept]
        return Searched(True, self._pick(excess + self._slack_cost(used), used, history))

    def _promising(
        self,
        excess: NDArray[np.float64],
        used: NDArray[Any],
        least: NDArray[Any],
        most: NDArray[Any],
        threshold: float,
    ) -> NDArray[np.int64]:
        fits = np.asarray(used + least <= self._room, dtype=bool).all(axis=1)
        certain = excess + self._slack_cost(used + most)
        return np.flatnonzero(fits & (certain <= threshold * (1 + TIE)))

    def _slack_cost(self, used: NDArray[Any]) -> NDArray[np.float64]:
        slack = np.maximum(self._room - used, 0).astype(np.float64)
        return np.asarray(slack @ self._price, dtype=np.float64)

    def _undominated(self, excess: NDArray[np.float64], used: NDArray[Any]) -> NDArray[np.int64]:
        cost = excess - used.astype(np.float64) @ self._price
        if used.shape[1] == 1:
            order = np.lexsort((cost, _sortable(used[:, 0])))
            lowest = np.minimum.accumulate(cost[order])
            first = np.concatenate([[True], cost[order][1:] < lowest[:-1]])
            return np.sort(order[first])
        if len(cost) > PAIRWISE:
            return np.arange(len(cost))
        worse = cost[:, None] <= cost[None, :]
        same = cost[:, None] == cost[None, :]
        for row in range(used.shape[1]):
            column = used[:, row]
            worse &= np.asarray(column[:, None] <= column[None, :], dtype=bool)
            same &= np.asarray(column[:, None] == column[None, :], dtype=bool)
        later = np.arange(len(cost))[:, None] < np.arange(len(cost))[None, :]
        return np.flatnonzero(~(worse & (~same | later)).any(axis=0))

    def _pick(
        self,
        total: NDArray[np.float64],
        used: NDArray[Any],
        history: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    ) -> Choice | None:
        order = np.argsort(total, kind="stable")[:50]
        near = order[total[order] <= total[order[0]] + 10 * TIE]
        return self._core.best([self._trace(int(index), history) for index in near])

    def _trace(self, label: int, history: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Choice:
        choice = list(self._base)
        for group, (parents, schemes) in zip(reversed(self._groups), reversed(history), strict=True):
            choice[group.index] = int(schemes[label])
            label = int(parents[label])
        return tuple(choice)

    def _group(self, index: int, reduced: NDArray[np.float64]) -> _Group:
        schemes = np.flatnonzero(self._core.open[index])
        usage = self._array([[rows[index, scheme] for rows in self._core.usage] for scheme in schemes])
        return _Group(index, schemes, reduced[index, schemes], usage.reshape(len(schemes), -1))

    def _fixed_use(self) -> list[tuple[int, int]]:
        groups = np.flatnonzero(self._fixed)
        pairs = zip(self._core.usage, self._core.limit, strict=True)
        return [(limit, sum(int(rows[g, self._base[g]]) for g in groups)) for rows, limit in pairs]

    def _order(self, free: NDArray[np.int64]) -> NDArray[np.int64]:
        """Groups whose usage varies most come first: what is left to decide then moves the totals little."""
        spread = np.zeros(len(free))
        for rows in self._core.usage:
            opened = self._core.open[free]
            span = (most_open(rows[free], opened) - least_open(rows[free], opened)).astype(np.float64)
            spread = np.maximum(spread, span / (span.max(initial=0) or 1.0))
        return free[np.argsort(-spread, kind="stable")]

    def _completions(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Per group: the least and the most that the groups after it can use, per row."""
        rows = len(self._core.usage)
        least, most = np.zeros(rows, dtype=self._dtype), np.zeros(rows, dtype=self._dtype)
        tails = []
        for group in reversed(self._groups):
            tails.append((least, most))
            least, most = least + group.usage.min(axis=0), most + group.usage.max(axis=0)
        return tails[::-1]

    def _array(self, values: list[Any]) -> NDArray[Any]:
        return np.array(values, dtype=self._dtype)


def _scale(core: Core, bound: Lagrangian, incumbent: Choice | None) -> int:
    """The excess of the incumbent, or without one the largest reduced cost: labels count in this unit."""
    room = int(bound.reduced.max()) if incumbent is None else bound.excess(core, incumbent)
    return max(1, room)


def _sortable(column: NDArray[Any]) -> NDArray[np.int64]:
    """Ranks that order like the column (lexsort does not take Python integers)."""
    if column.dtype != object:
        return column
    _, ranks = np.unique(column, return_inverse=True)
    return np.asarray(ranks, dtype=np.int64)
