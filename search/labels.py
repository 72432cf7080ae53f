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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.core import Core, Lagrangian
from search.deadline import Deadline
from search.items import Group, Indices, Item, alike, pairs
from search.join import Join
from search.listing import Labels, Room, listed
from search.problem import DEFAULT_GAP, Choice

MOST_LABELS = 200_000
FEWER = 20_000
"""So many partial choices at most are a heuristic: it goes on where some had to be left out."""
FIRST = 14
STEP = 1.5
LEAST_STEP = 1.1
LATE = 40
LATE_STEP = 1.2
FEW = 2**12
TIE = 1e-12
EPSILON = 2.0**-54
MANY = 4
"""Groups of equal usage that are listed together."""


@dataclass(frozen=True)
class Searched:
    """`complete`: every choice with an excess up to the room was considered; `choice`: the best found.

    `slip`: how much cheaper than that another one may be for rounding, in cost units of the core. `done`:
    where it is not complete, no choice has an excess up to this, in units of the bound.
    """

    complete: bool
    choice: Choice | None
    slip: Fraction = Fraction(0)
    done: int = 0


def search_labels(
    core: Core,
    bound: Lagrangian,
    room: int | None,
    deadline: Deadline,
    gap: float = DEFAULT_GAP,
    done: int = 0,
    most: int = MOST_LABELS,
) -> Searched:
    """The cheapest feasible choice with an excess up to `room` (units of `bound`; None: any), or proof that
    there is none. Where rounding could hide more than `gap`, or choices are few, the search is run again in
    integers. There is known to be none with an excess up to `done`. At most `most` partial choices are listed
    at a time; with no more than FEWER the search goes on to an answer where it cannot be a proof.
    """
    found = _Halves(core, bound, room, done=done, most=most).search(deadline)
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


class _Halves:
    """The open groups by the reduced cost of their second cell.

    Labels count in units of the room, in float64; with `exact` in those of the bound, in integers.
    """

    def __init__(
        self,
        core: Core,
        bound: Lagrangian,
        room: int | None,
        *,
        exact: bool = False,
        done: int = 0,
        most: int = MOST_LABELS,
    ) -> None:
        self._most = most
        self._core, self._is_exact = core, exact
        largest = int(bound.reduced.max(initial=0))
        self._unit = 1 if exact else max(1, largest if room is None else room)
        self._last = np.inf if room is None else room if exact else 1.0
        self._done = done
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
        self._groups: list[Group] = []
        self._classes = self._alike()

    def search(self, deadline: Deadline) -> Searched:
        if bool((self._left >= 0).all()) and not (self._price * self._left).any():
            return Searched(True, tuple(self._base.tolist()))
        complete, done = True, self._done
        for threshold in self._thresholds():
            found = self._run(threshold, deadline)
            complete &= found.complete
            if found.choice is not None or deadline.passed() or not (complete or self._most <= FEWER):
                ended = found.choice is not None or not threshold < self._last
                return replace(found, complete=complete and ended, done=done)
            if complete and threshold < self._last:
                reached = Fraction(threshold) - found.slip / self._cost_unit
                done = max(done, int(reached * self._unit))
        return Searched(complete, None, done=done)

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
        rising: list[Any] = []
        for value in values:
            if max(self._done / self._unit, LEAST_STEP * rising[-1] if rising else 0.0) < value < self._last:
                rising.append(value)
        return [*rising, self._last]

    def _alike(self) -> list[Indices]:
        """The groups of equal usage, where several limits make that worth while and there are many."""
        if len(self._core.usage) < 2 or len(self._order) < MANY:
            return []
        return [each for each in alike(list(self._core.usage), self._order) if len(each) >= MANY]

    def _run(self, threshold: Any, deadline: Deadline) -> Searched:
        tie = 0 if self._is_exact else TIE
        limit = threshold if self._is_exact else threshold * (1 + TIE)
        room = Room(self._left, self._price, limit)
        items = self._items(room, deadline)
        first, second = self._parted(items)
        lists = tuple(
            listed(*each, room, deadline, self._most) for each in ((first, second), (second, first))
        )
        joined, complete = Join(room, tie, *lists).best(deadline)
        choice = self._core.best([self._choice(lists[0].chosen(a) | lists[1].chosen(b)) for a, b in joined])
        opened = int(np.searchsorted(self._second, limit, side="right"))
        slip = Fraction(0) if self._is_exact else self._slip(opened, limit, lists)
        whole = all(each.complete for each in (*lists, *items) if isinstance(each, Labels))
        return Searched(complete and whole, choice, slip)

    def _items(self, room: Room, deadline: Deadline) -> list[Item]:
        """What is open up to the limit of the room; groups of equal usage together."""
        wanted = int(np.searchsorted(self._second, room.limit, side="right"))
        together, single = [], np.ones(len(self._core.open), dtype=bool)
        for members in self._classes:
            here = members[np.asarray(self._reduced[members] <= room.limit, dtype=bool).sum(axis=1) > 1]
            if len(here) >= MANY:
                together.append(here)
                single[here] = False
        if not together:
            self._groups += [self._group(int(g)) for g in self._order[len(self._groups) : wanted]]
            return [group.cut(room.limit) for group in self._groups[:wanted]]
        alone = [self._group(int(g)).cut(room.limit) for g in self._order[:wanted] if single[g]]
        return [*(self._together(members, room, deadline) for members in together), *alone]

    def _together(self, members: Indices, room: Room, deadline: Deadline) -> Item:
        """Groups of equal usage as one item."""
        schemes = np.flatnonzero(np.asarray(self._reduced[members] <= room.limit, dtype=bool).any(axis=0))
        if len(schemes) == 2:
            a, b = schemes.tolist()
            steps = np.array([rows[members, b] - rows[members, a] for rows in self._core.usage])
            if (steps == steps[:, :1]).all():
                step = steps[:, 0].astype(self._integer)
                return pairs((a, b), members, self._reduced[np.ix_(members, schemes)], step, room.limit)
        groups = [self._group(int(g)).cut(room.limit) for g in members]
        return listed(groups, None, room, deadline, self._most).rising

    def _parted(self, items: list[Item]) -> tuple[list[Item], list[Item]]:
        """Two parts of about as many choices."""
        if not self._classes:
            return items[0::2], items[1::2]
        halves: tuple[list[Item], list[Item]] = [], []
        sizes = [0.0, 0.0]
        for item in sorted(items, key=lambda item: -len(item.reduced)):
            side = int(sizes[1] < sizes[0])
            halves[side].append(item)
            sizes[side] += math.log(len(item.reduced))
        return halves

    def _slip(self, groups: int, limit: float, halves: Sequence[Labels]) -> Fraction:
        """What the roundings of all labels may come to, in cost units."""
        used = [np.abs(labels.usage.astype(np.float64)) @ self._price for labels in halves]
        largest = max(float(each.max(initial=0.0)) for each in used)
        reach = largest + (limit if np.isfinite(limit) else groups)
        return Fraction(groups * 2.0**-50 * reach) * self._cost_unit

    def _choice(self, changed: dict[int, int]) -> Choice:
        chosen = self._base.copy()
        for group, scheme in changed.items():
            chosen[group] = scheme
        return tuple(chosen.tolist())

    def _group(self, index: int) -> Group:
        reduced = self._reduced[index]
        finite = np.flatnonzero(np.asarray(reduced < np.inf, dtype=bool))
        schemes = finite[np.argsort(reduced[finite], kind="stable")]
        base = int(schemes[0])
        usage = [
            [int(rows[index, scheme]) - int(rows[index, base]) for rows in self._core.usage]
            for scheme in schemes.tolist()
        ]
        return Group(index, schemes, reduced[schemes], self._array(usage).reshape(len(schemes), -1))

    def _array(self, values: list[Any]) -> NDArray[Any]:
        return np.array(values, dtype=self._integer)
