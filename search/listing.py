"""Lists of partial choices: every one that some completion may bring to an answer, without those that others
make needless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.deadline import Deadline
from search.items import Indices, Item, Numbers

MOST_EXACT = 50_000
MOST_NEW = 5_000_000
DENSE = 20_000
PRUNED = 128
CROWD = 2_000
NEAR = 16
FRUITFUL = 0.1

Step = tuple[Indices, Indices]


@dataclass(frozen=True, eq=False)
class Labels:
    """Partial choices over some items: excess (labels,), usage (labels, rows), and how each came about."""

    items: tuple[Item, ...]
    reduced: Numbers
    usage: NDArray[Any]
    steps: tuple[Step, ...]
    complete: bool

    @cached_property
    def ends(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The least and the most usage, per row."""
        return self.usage.min(axis=0), self.usage.max(axis=0)

    def chosen(self, label: int) -> dict[int, int]:
        """Group -> scheme of a label."""
        chosen: dict[int, int] = {}
        for item, (parents, cells) in zip(reversed(self.items), reversed(self.steps), strict=True):
            chosen |= item.chosen(int(cells[label]))
            label = int(parents[label])
        return chosen

    @cached_property
    def rising(self) -> Labels:
        """The same by rising excess: an item of longer lists."""
        order = np.argsort(self.reduced, kind="stable")
        *before, (parents, cells) = self.steps
        steps = (*before, (parents[order], cells[order]))
        return Labels(self.items, self.reduced[order], self.usage[order], steps, self.complete)


@dataclass(frozen=True, eq=False)
class Room:
    """What all groups together may use above their cheapest cells, the prices of that, the most excess."""

    left: NDArray[Any]
    price: Numbers
    limit: Any

    @property
    def exact(self) -> bool:
        """Whether numbers are Python integers."""
        return self.price.dtype == object


def listed(
    items: Sequence[Item], others: Sequence[Item] | None, room: Room, deadline: Deadline, most: int
) -> Labels:
    """The partial choices of `items` that a completion by `others` (None: anything) may bring to an answer.

    At most `most` of them, fewer of exact ones; where there are more, the list is not complete.
    """
    rows = len(room.left)
    excess, used = np.zeros(1, dtype=room.price.dtype), np.zeros((1, rows), dtype=room.left.dtype)
    cap = min(most, MOST_EXACT) if room.exact else most
    after = None if others is None else _after(items, others, rows)
    steps: list[Step] = []
    complete, few = True, PRUNED if after else 1
    pruned = few
    for position, item in enumerate(items):
        parents, cells, whole = _expanded(excess, item.reduced, room.limit)
        complete &= whole
        excess, used = excess[parents] + item.reduced[cells], used[parents] + item.usage[cells]
        if len(excess) > pruned or (position == len(items) - 1 and len(excess) > few):
            kept = np.arange(len(excess))
            if after:
                kept = _promising(excess, used, after[position], room).nonzero()[0]
            if not deadline.passed():
                kept = kept[undominated(excess[kept], used[kept], room.price)]
            parents, cells, excess, used = parents[kept], cells[kept], excess[kept], used[kept]
            pruned = max(few, 2 * len(kept))
        if len(excess) > cap or deadline.passed():
            kept = np.argsort(excess, kind="stable")[: cap // 8]
            parents, cells, excess, used = parents[kept], cells[kept], excess[kept], used[kept]
            complete = False
        steps.append((parents, cells))
    return Labels(tuple(items), excess, used, tuple(steps), complete)


def _after(
    items: Sequence[Item], others: Sequence[Item], rows: int
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Per position, the least and the most that everything after it may use."""
    rest = [item.ends for item in (*items[1:], *others)]
    ends = np.array(rest).reshape(len(rest), 2, rows)[::-1].cumsum(axis=0)[::-1]
    last = np.zeros((1, 2, rows), dtype=ends.dtype)
    return [(low, high) for low, high in np.concatenate([ends, last])]


def _expanded(excess: Numbers, reduced: Numbers, limit: Any) -> tuple[Indices, Indices, bool]:
    """Labels and cells whose sum is at most `limit`, and whether that is all of them."""
    if len(excess) * len(reduced) <= DENSE:
        kept = np.asarray(excess[:, None] + reduced <= limit, dtype=bool)
        parents, cells = kept.nonzero()
        return parents, cells, True
    counts = np.searchsorted(reduced, limit - excess, side="right")
    total, whole = int(counts.sum()), True
    if total > MOST_NEW:
        order = np.argsort(excess, kind="stable")
        cut = order[int(np.searchsorted(np.cumsum(counts[order]), MOST_NEW)) :]
        counts[cut] = 0
        total, whole = int(counts.sum()), False
    parents = np.repeat(np.arange(len(excess)), counts)
    return parents, np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts), whole


def _promising(
    excess: Numbers, used: NDArray[Any], rest: tuple[NDArray[Any], NDArray[Any]], room: Room
) -> NDArray[np.bool_]:
    """Labels that some completion brings within the limits and none leaves too far below them."""
    least, most = rest
    fits = np.asarray(used + least <= room.left, dtype=bool).all(axis=1)
    slack = np.maximum(room.left - used - most, 0).astype(room.price.dtype)
    near = np.asarray(excess + slack @ room.price <= room.limit, dtype=bool)
    kept: NDArray[np.bool_] = fits & near
    return kept


def undominated(excess: Numbers, used: NDArray[Any], price: Numbers) -> Indices:
    """The labels that count: with one limit those that no cheaper one undercuts; with several the cheapest of
    those that use the same, without many that a neighbor beats in cost and in every limit.
    """
    if not len(excess):
        return np.arange(0)
    value = excess - used.astype(price.dtype) @ price
    columns = [sortable(column) for column in used.T]
    order = np.lexsort((sortable(value), *columns[1:], *columns[:1]))
    if len(columns) == 1:
        lowest = np.minimum.accumulate(value[order])
        first = np.concatenate([[True], np.asarray(value[order][1:] < lowest[:-1], dtype=bool)])
        return np.sort(order[first])
    same = np.ones(len(order) - 1, dtype=bool)
    for column in columns:
        same &= column[order][1:] == column[order][:-1]
    order = order[np.concatenate([[True], ~same])]
    if price.dtype != object and columns and len(order) > CROWD:
        order = _thinned(order, value, columns[1:])
    return np.sort(order)


def _thinned(order: Indices, value: Numbers, columns: Sequence[NDArray[Any]]) -> Indices:
    """Labels sorted by the first limit's usage, without those that one a few places before is no worse than
    in cost and in the other `columns`.
    """
    while True:
        beaten = np.zeros(len(order), dtype=bool)
        parts = [value[order], *(column[order] for column in columns)]
        for shift in range(1, min(NEAR, len(order) - 1) + 1):
            worse = parts[0][:-shift] <= parts[0][shift:]
            for part in parts[1:]:
                worse &= part[:-shift] <= part[shift:]
            beaten[shift:] |= worse
        order = order[~beaten]
        if beaten.sum() < FRUITFUL * len(beaten) or len(order) <= CROWD:
            return order


def sortable(column: NDArray[Any]) -> NDArray[Any]:
    """Ranks that order like the column (lexsort does not take Python integers)."""
    if column.dtype != object:
        return column
    _, ranks = np.unique(column, return_inverse=True)
    return np.asarray(ranks, dtype=np.int64)
