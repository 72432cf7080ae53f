"""Pairs of partial choices from two halves that together keep the limits, the cheapest first wanted.

With a bound on the excess, a pair may leave only so much of a priced limit unused: partners of a label lie in
a window of usage. They are sorted by one limit, in strips as wide as the window, and within a strip by
another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.deadline import Deadline
from search.items import Indices
from search.listing import PRUNED, Labels, Room, sortable

MOST_PAIRS = 40_000_000
CHUNK = 500_000
BANDS = 8
NEAREST = 50
MOST_KEY = 2**62

Windows = list[tuple[Indices, Indices]]
"""Where among the partners those of each label begin and end; several such stretches for each."""


@dataclass(frozen=True, eq=False)
class _Partners:
    """The second half in the order in which windows are stretches.

    `key` is what they are sorted by: usage of `pivot`, or strip times `span` plus usage of `other`.
    """

    order: Indices
    key: NDArray[Any]
    width: int = 0
    span: int = 0


class Join:
    """Pairs of labels from two halves. `tie`: excesses that differ by less are equal."""

    def __init__(self, room: Room, tie: float, first: Labels, second: Labels) -> None:
        self._left, self._price, self._limit, self._tie = room.left, room.price, room.limit, 10 * tie
        self._exact = room.exact
        self._first, self._second = first, second
        self._found: list[tuple[Any, int, int]] = []
        spread = np.ptp(second.usage, axis=0) * self._price if len(second.usage) else self._price
        self._rows = np.argsort(-spread.astype(np.float64), kind="stable").tolist()

    def best(self, deadline: Deadline) -> tuple[list[tuple[int, int]], bool]:
        """The pairs that tie for the least excess within the limits, and whether all were looked at."""
        if not len(self._first.reduced) or not len(self._second.reduced):
            return [], True
        budget, bands = MOST_PAIRS, self._bands()
        for band in range(bands):
            floor = self._limit * band / bands if band else 0
            ceiling = self._limit * (band + 1) / bands if band < bands - 1 else np.inf
            inside = (self._first.reduced >= floor) & (self._first.reduced < ceiling)
            rows = np.flatnonzero(np.asarray(inside, dtype=bool))
            near = np.asarray(self._second.reduced <= self._limit - floor, dtype=bool)
            budget = self._scan(rows, np.flatnonzero(near), floor, budget, deadline)
            if budget < 0:
                return self._nearest(), False
        return self._nearest(), True

    def _bands(self) -> int:
        """Parts of the first half by excess: labels of a high one have few partners."""
        few = len(self._first.reduced) * len(self._second.reduced) <= CHUNK
        return 1 if few or self._exact or len(self._price) == 1 or not self._limit < np.inf else BANDS

    def _scan(self, rows: Indices, near: Indices, floor: Any, budget: int, deadline: Deadline) -> int:
        """Looks at the pairs of some labels; returns what is left of the budget, negative when it ran out."""
        if not len(rows) or not len(near):
            return budget
        partners = self._sorted(near, floor)
        for low, high in self._windows(rows, partners):
            counts = np.maximum(high - low, 0)
            some = np.flatnonzero(counts)
            starts, counts, wanted = low[some], counts[some], rows[some]
            ends = np.cumsum(counts)
            begin = 0
            while begin < len(wanted):
                done = int(ends[begin - 1]) if begin else 0
                stop = max(begin + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
                budget -= int(ends[stop - 1]) - done
                if budget < 0 or deadline.passed():
                    return -1
                here = counts[begin:stop]
                first = np.repeat(wanted[begin:stop], here)
                offset = np.arange(len(first)) - np.repeat(np.cumsum(here) - here, here)
                self._rate(first, partners.order[np.repeat(starts[begin:stop], here) + offset])
                begin = stop
        return budget

    def _sorted(self, near: Indices, floor: Any) -> _Partners:
        """Partners in strips where two limits have prices, else by the usage of the one that tells most."""
        if not self._rows:
            return _Partners(near, np.zeros(len(near)))
        column = self._second.usage[near, self._rows[0]]
        reach = self._reach(self._rows[0], np.asarray([floor]))
        if len(self._rows) > 1 and reach is not None and column.dtype != object:
            width = int(reach[0]) + 1
            other = self._second.usage[near, self._rows[1]]
            span = int(np.ptp(other)) + 2
            if (int(np.ptp(column)) // width + 2) * span < MOST_KEY:
                key = (column - column.min()) // width * span + (other - other.min())
                order = np.argsort(key, kind="stable")
                return _Partners(near[order], key[order], width, span)
        order = np.argsort(sortable(column), kind="stable")
        return _Partners(near[order], column[order])

    def _reach(self, row: int, excess: NDArray[Any]) -> NDArray[np.int64] | None:
        """How much of a limit may stay unused, at most, for labels of such an excess; None for any."""
        price = self._price[row]
        if self._exact or not price > 0 or not self._limit < np.inf:
            return None
        reach = np.maximum(self._limit - excess, 0.0) / price * (1 + 1e-9) + 1
        return np.asarray(np.minimum(reach, 2.0**61)).astype(np.int64)

    def _windows(self, rows: Indices, partners: _Partners) -> Windows:
        """Where partners of labels are: those outside break a limit or leave too much of one."""
        if not self._rows:
            return [(np.zeros(len(rows), dtype=np.int64), np.full(len(rows), len(partners.order)))]
        pivot = self._rows[0]
        need = self._left[pivot] - self._first.usage[rows, pivot]
        reach = self._reach(pivot, self._first.reduced[rows])
        if partners.span:
            assert reach is not None, "strips are as wide as the reach"
            return self._strips(rows, partners, need, reach)
        high = np.searchsorted(partners.key, need, side="right")
        if len(self._price) == 1 and len(partners.key) > PRUNED:
            return [(np.maximum(high - 1, 0), high)]
        if reach is None:
            return [(np.zeros_like(high), high)]
        return [(np.searchsorted(partners.key, need - reach, side="left"), high)]

    def _strips(
        self, rows: Indices, partners: _Partners, need: NDArray[Any], reach: NDArray[np.int64]
    ) -> Windows:
        """The stretches in the strip where the window of the pivot ends and in the one before."""
        near = self._second.usage[partners.order]
        lowest, second = near[:, self._rows[0]].min(), self._rows[1]
        base = near[:, second].min()
        most = self._left[second] - self._first.usage[rows, second]
        top = np.clip(most - base, -1, partners.span - 2)
        wide = self._reach(second, self._first.reduced[rows])
        bottom = np.zeros_like(top) if wide is None else np.clip(most - wide - base, 0, partners.span - 1)
        last, start = (need - lowest) // partners.width, (need - reach - lowest) // partners.width
        found: Windows = []
        strips = int(partners.key[-1]) // partners.span + 1
        for strip in (last, last - 1):
            inside = (strip >= 0) & (strip >= start) & (top >= bottom)
            at = np.clip(strip, -1, strips) * partners.span
            begin = np.searchsorted(partners.key, at + bottom, side="left")
            end = np.searchsorted(partners.key, at + top, side="right")
            found.append((begin, np.where(inside, end, begin)))
        return found

    def _rate(self, first: Indices, second: Indices) -> None:
        slack = self._left - self._first.usage[first] - self._second.usage[second]
        fits = np.asarray(slack >= 0, dtype=bool).all(axis=1)
        total = self._first.reduced[first] + self._second.reduced[second]
        total = np.where(fits, total + slack.astype(self._price.dtype) @ self._price, np.inf)
        best = total.min(initial=np.inf)
        if not best <= self._limit:
            return
        near = np.flatnonzero(np.asarray(total <= best + self._tie, dtype=bool))
        near = near[np.argsort(total[near], kind="stable")[:NEAREST]]
        self._found += [(total[i], int(first[i]), int(second[i])) for i in near]
        self._limit = min(self._limit, best + self._tie)

    def _nearest(self) -> list[tuple[int, int]]:
        found = sorted(item for item in self._found if item[0] <= self._limit)[:NEAREST]
        return [(first, second) for _, first, second in found]
