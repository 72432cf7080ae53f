"""Exhaustive search of what reduced costs leave open, in two halves that meet (Horowitz and Sahni, 1974).

A label is a partial choice: what it has used of every row, and its excess so far over the Lagrangian bound.
The excess of a complete choice is the sum of its reduced costs plus multipliers times slacks. For a
threshold, only groups with a second cell below it are open; each half of them is listed with labels dropped
when no completion keeps the limits, when the excess passes the threshold, or when another label is no worse
in everything. Then pairs of both halves are joined. The threshold is raised from small values, so the first
one with an answer proves it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.core import Core, Lagrangian
from search.deadline import Deadline
from search.problem import DEFAULT_GAP, Choice

MOST_LABELS = 200_000
MOST_PAIRS = 40_000_000
CHUNK = 500_000
BANDS = 8
PRUNED = 128
FIRST = 14
STEP = 1.5
LATE = 40
LATE_STEP = 1.2
FEW = 2**12
TIE = 1e-12
NEAREST = 50
EPSILON = 2.0**-54
MOST_EXACT = 50_000

Numbers = NDArray[Any]
"""float64, or Python integers where the search is exact."""
Indices = NDArray[np.int64]
Step = tuple[Indices, Indices]


@dataclass(frozen=True)
class Searched:
    """`complete`: every choice with an excess up to the room was considered; `choice`: the best found.

    `slip`: how much cheaper than that another one may be for rounding, in cost units of the core.
    """

    complete: bool
    choice: Choice | None
    slip: Fraction = Fraction(0)


def search_labels(
    core: Core,
    bound: Lagrangian,
    room: int | None,
    deadline: Deadline,
    gap: float = DEFAULT_GAP,
    done: int = 0,
) -> Searched:
    """The cheapest feasible choice with an excess up to `room` (units of `bound`; None: any), or proof that
    there is none. Where rounding could hide more than `gap`, or choices are few, the search is run again in
    integers. There is known to be none with an excess up to `done`.
    """
    found = _Halves(core, bound, room, done=done).search(deadline)
    if not found.complete or found.choice is None:
        return found
    allowed = EPSILON if _few(core) else max(gap / 2, EPSILON)
    if found.slip <= Fraction(allowed) * abs(core.total(found.choice) + core.offset):
        return found
    exact = _Halves(core, bound, bound.excess(core, found.choice), exact=True).search(deadline)
    return exact if exact.complete and exact.choice is not None else found


def _few(core: Core) -> bool:
    count: int = math.prod(core.open.sum(axis=1).tolist())
    return count <= FEW


@dataclass(frozen=True, eq=False)
class _Group:
    """One open group: its cells by rising reduced cost (the first has none), usage above the first's."""

    index: int
    schemes: Indices
    reduced: Numbers
    usage: NDArray[Any]

    @cached_property
    def levels(self) -> list[Any]:
        """The reduced costs."""
        return list(self.reduced.tolist())

    @cached_property
    def least(self) -> NDArray[Any]:
        """The least it can use, per row."""
        least: NDArray[Any] = self.usage.min(axis=0)
        return least

    @cached_property
    def most(self) -> NDArray[Any]:
        """The most it can use, per row."""
        most: NDArray[Any] = self.usage.max(axis=0)
        return most


@dataclass(frozen=True, eq=False)
class _Labels:
    """Partial choices of one half: excess (labels,), usage (labels, rows), and how each came about."""

    groups: tuple[_Group, ...]
    excess: Numbers
    used: NDArray[Any]
    steps: tuple[Step, ...]
    complete: bool

    def trace(self, label: int) -> dict[int, int]:
        """Group -> scheme of a label."""
        chosen = {}
        for group, (parents, cells) in zip(reversed(self.groups), reversed(self.steps), strict=True):
            chosen[group.index] = int(group.schemes[cells[label]])
            label = int(parents[label])
        return chosen


class _Halves:
    """The open groups by the reduced cost of their second cell.

    Labels count in units of the room, in float64; with `exact` in those of the bound, in integers.
    """

    def __init__(
        self, core: Core, bound: Lagrangian, room: int | None, *, exact: bool = False, done: int = 0
    ) -> None:
        self._core, self._is_exact = core, exact
        largest = int(bound.reduced.max(initial=0))
        self._unit = 1 if exact else max(1, largest if room is None else room)
        self._last = np.inf if room is None else room if exact else 1.0
        self._done = done / self._unit
        self._cost_unit = Fraction(self._unit, 1 << bound.bits)
        self._number: Any = object if exact else np.float64
        scaled = bound.multipliers if exact else [float(Fraction(m, self._unit)) for m in bound.multipliers]
        self._price = np.array(scaled, dtype=self._number)
        reduced = bound.reduced if exact else (bound.reduced / self._unit).astype(np.float64)
        reduced = np.where(core.open, reduced, np.inf)
        self._base = reduced.argmin(axis=1)
        everyone = np.arange(len(reduced))
        self._integer = np.int64 if all(rows.dtype != object for rows in core.usage) else object
        pairs = zip(core.usage, core.limit, strict=True)
        self._left = self._array([limit - int(rows[everyone, self._base].sum()) for rows, limit in pairs])
        others = reduced.copy()
        others[everyone, self._base] = np.inf
        second = others.min(axis=1)
        order = np.argsort(second, kind="stable")
        self._reduced = reduced
        self._order = order[np.asarray(second[order] < np.inf, dtype=bool)]
        self._second = second[self._order]
        self._groups: list[_Group] = []

    def search(self, deadline: Deadline) -> Searched:
        if bool((self._left >= 0).all()) and not (self._price * self._left).any():
            return Searched(True, tuple(self._base.tolist()))
        found = Searched(True, None)
        for threshold in self._thresholds():
            found = self._run(threshold, deadline)
            if not found.complete or found.choice is not None:
                return found
        return found

    def _thresholds(self) -> list[Any]:
        """Rising: the second cells of ever more groups; only the last one where there are few choices."""
        if self._is_exact or _few(self._core) or not len(self._second):
            return [self._last]
        values = []
        size = FIRST
        while size < len(self._second):
            values.append(float(self._second[size]))
            size = math.ceil(size * (STEP if size < LATE else LATE_STEP))
        value = max(float(self._second[-1]), TIE)
        while value < min(self._last, 10.0):
            values.append(value)
            value *= STEP**2
        return [*(value for value in values if self._done < value < self._last), self._last]

    def _run(self, threshold: Any, deadline: Deadline) -> Searched:
        tie = 0 if self._is_exact else TIE
        limit = threshold if self._is_exact else threshold * (1 + TIE)
        wanted = int(np.searchsorted(self._second, limit, side="right"))
        self._groups += [self._group(int(g)) for g in self._order[len(self._groups) : wanted]]
        opened = [self._cut(group, limit) for group in self._groups[:wanted]]
        first = self._listed(opened[0::2], opened[1::2], limit, deadline)
        second = self._listed(opened[1::2], opened[0::2], limit, deadline)
        pairs, complete = _Join(self._left, self._price, limit, tie, first, second).best(deadline)
        choice = self._core.best([self._choice(first.trace(a) | second.trace(b)) for a, b in pairs])
        slip = Fraction(0) if self._is_exact else self._slip(len(opened), limit, (first, second))
        return Searched(complete and first.complete and second.complete, choice, slip)

    def _slip(self, groups: int, limit: float, halves: tuple[_Labels, _Labels]) -> Fraction:
        """What the roundings of all labels may come to, in cost units."""
        used = [np.abs(labels.used.astype(np.float64)) @ self._price for labels in halves]
        largest = max(float(each.max(initial=0.0)) for each in used)
        reach = largest + (limit if np.isfinite(limit) else groups)
        return Fraction(groups * 2.0**-50 * reach) * self._cost_unit

    def _choice(self, changed: dict[int, int]) -> Choice:
        chosen = self._base.copy()
        for group, scheme in changed.items():
            chosen[group] = scheme
        return tuple(chosen.tolist())

    def _listed(
        self, groups: list[_Group], others: list[_Group], limit: float, deadline: Deadline
    ) -> _Labels:
        """Every label of some groups that a completion by the rest may bring to an answer."""
        rows = len(self._core.usage)
        excess, used = np.zeros(1, dtype=self._number), np.zeros((1, rows), dtype=self._integer)
        cap = MOST_EXACT if self._is_exact else MOST_LABELS
        steps: list[Step] = []
        complete, pruned = True, PRUNED
        for position, group in enumerate(groups):
            count = len(group.reduced)
            excess = (excess[:, None] + group.reduced).ravel()
            used = (used[:, None, :] + group.usage).reshape(-1, rows)
            kept = (excess <= limit).nonzero()[0]
            if len(kept) > pruned or (position == len(groups) - 1 and len(kept) > PRUNED):
                kept = kept[
                    self._promising(excess[kept], used[kept], [*groups[position + 1 :], *others], limit)
                ]
                kept = kept[self._undominated(excess[kept], used[kept])]
                pruned = max(PRUNED, 2 * len(kept))
            if len(kept) > cap or deadline.passed():
                kept, complete = kept[np.argsort(excess[kept], kind="stable")[: cap // 8]], False
            steps.append((kept // count, kept % count))
            excess, used = excess[kept], used[kept]
        return _Labels(tuple(groups), excess, used, tuple(steps), complete)

    def _promising(
        self, excess: Numbers, used: NDArray[Any], rest: list[_Group], limit: Any
    ) -> NDArray[np.bool_]:
        """Labels that some completion brings within the limits and none leaves too far below them."""
        least, most = sum(group.least for group in rest), sum(group.most for group in rest)
        fits = np.asarray(used + least <= self._left, dtype=bool).all(axis=1)
        slack = np.maximum(self._left - used - most, 0).astype(self._number)
        near = np.asarray(excess + slack @ self._price <= limit, dtype=bool)
        kept: NDArray[np.bool_] = fits & near
        return kept

    def _undominated(self, excess: Numbers, used: NDArray[Any]) -> Indices:
        """Of labels that use the same, the cheapest; with one limit, those that no cheaper one undercuts."""
        if not len(excess):
            return np.arange(0)
        value = excess - used.astype(self._number) @ self._price
        columns = [_sortable(column) for column in used.T]
        order = np.lexsort((_sortable(value), *columns))
        if len(columns) == 1:
            lowest = np.minimum.accumulate(value[order])
            first = np.concatenate([[True], np.asarray(value[order][1:] < lowest[:-1], dtype=bool)])
        else:
            same = np.ones(len(order) - 1, dtype=bool)
            for column in columns:
                same &= column[order][1:] == column[order][:-1]
            first = np.concatenate([[True], ~same])
        return np.sort(order[first])

    def _group(self, index: int) -> _Group:
        reduced = self._reduced[index]
        finite = np.flatnonzero(np.asarray(reduced < np.inf, dtype=bool))
        schemes = finite[np.argsort(reduced[finite], kind="stable")]
        base = int(schemes[0])
        usage = [
            [int(rows[index, scheme]) - int(rows[index, base]) for rows in self._core.usage]
            for scheme in schemes.tolist()
        ]
        return _Group(index, schemes, reduced[schemes], self._array(usage).reshape(len(schemes), -1))

    def _cut(self, group: _Group, limit: float) -> _Group:
        """The cells of a group up to a threshold."""
        count = bisect_right(group.levels, limit)
        if count == len(group.levels):
            return group
        return _Group(group.index, group.schemes[:count], group.reduced[:count], group.usage[:count])

    def _array(self, values: list[Any]) -> NDArray[Any]:
        return np.array(values, dtype=self._integer)


class _Join:
    """Pairs of labels from two halves, cheapest first wanted."""

    def __init__(
        self, left: NDArray[Any], price: Numbers, limit: Any, tie: float, first: _Labels, second: _Labels
    ) -> None:
        self._left, self._price, self._limit, self._tie = left, price, limit, 10 * tie
        self._first, self._second = first, second
        self._found: list[tuple[Any, int, int]] = []

    def best(self, deadline: Deadline) -> tuple[list[tuple[int, int]], bool]:
        """The pairs that tie for the least excess within the limits, and whether all were looked at."""
        if not len(self._first.excess) or not len(self._second.excess):
            return [], True
        pivot = self._pivot()
        columns = self._second.used[:, pivot] if pivot is not None else np.zeros(len(self._second.excess))
        order = np.argsort(_sortable(columns), kind="stable")
        budget, bands = MOST_PAIRS, self._bands()
        for band in range(bands):
            floor = self._limit * band / bands if band else 0
            ceiling = self._limit * (band + 1) / bands if band < bands - 1 else np.inf
            inside = (self._first.excess >= floor) & (self._first.excess < ceiling)
            rows = np.flatnonzero(np.asarray(inside, dtype=bool))
            partners = order[np.asarray(self._second.excess[order] <= self._limit - floor, dtype=bool)]
            budget = self._scan(rows, partners, pivot, budget, deadline)
            if budget < 0:
                return self._nearest(), False
        return self._nearest(), True

    def _bands(self) -> int:
        """Parts of the first half by excess: labels of a high one have few partners."""
        few = len(self._first.excess) * len(self._second.excess) <= CHUNK
        exact = self._price.dtype == object
        return 1 if few or exact or len(self._price) == 1 or not self._limit < np.inf else BANDS

    def _pivot(self) -> int | None:
        """The row that leaves each label the fewest partners."""
        if not len(self._price):
            return None
        spread = np.ptp(self._second.used, axis=0) * self._price
        return int(spread.argmax())

    def _scan(
        self, rows: Indices, partners: Indices, pivot: int | None, budget: int, deadline: Deadline
    ) -> int:
        """Looks at the pairs of some labels; returns what is left of the budget, negative when it ran out."""
        if not len(rows) or not len(partners):
            return budget
        low, high = self._window(rows, partners, pivot)
        counts = np.maximum(high - low, 0)
        ends = np.cumsum(counts)
        begin = 0
        while begin < len(rows):
            done = int(ends[begin - 1]) if begin else 0
            stop = max(begin + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
            budget -= int(ends[stop - 1]) - done
            if budget < 0 or deadline.passed():
                return -1
            here = counts[begin:stop]
            first = np.repeat(rows[begin:stop], here)
            offset = np.arange(len(first)) - np.repeat(np.cumsum(here) - here, here)
            self._rate(first, partners[np.repeat(low[begin:stop], here) + offset])
            begin = stop
        return budget

    def _window(self, rows: Indices, partners: Indices, pivot: int | None) -> tuple[Indices, Indices]:
        """Where among the partners, sorted by the pivot row, those that may fit begin and end."""
        if pivot is None:
            return np.zeros(len(rows), dtype=np.int64), np.full(len(rows), len(partners))
        usage = self._second.used[partners, pivot]
        need = self._left[pivot] - self._first.used[rows, pivot]
        high = np.searchsorted(usage, need, side="right")
        price = self._price[pivot]
        if len(self._price) == 1 and len(usage) > PRUNED:
            return np.maximum(high - 1, 0), high
        if not price > 0 or not self._limit < np.inf or self._price.dtype == object:
            return np.zeros_like(high), high
        reach = (self._limit - self._first.excess[rows]) / price * (1 + 1e-9) + 1
        floor = need.astype(np.float64) - reach
        floor -= np.abs(floor) * 1e-12
        return np.searchsorted(usage.astype(np.float64), floor, side="left"), high

    def _rate(self, first: Indices, second: Indices) -> None:
        slack = self._left - self._first.used[first] - self._second.used[second]
        fits = np.asarray(slack >= 0, dtype=bool).all(axis=1)
        total = self._first.excess[first] + self._second.excess[second]
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


def _sortable(column: NDArray[Any]) -> NDArray[Any]:
    """Ranks that order like the column (lexsort does not take Python integers)."""
    if column.dtype != object:
        return column
    _, ranks = np.unique(column, return_inverse=True)
    return np.asarray(ranks, dtype=np.int64)
