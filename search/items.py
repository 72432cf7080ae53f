"""What lists of partial choices are made from: single open groups, and groups that are used up alike.

An item offers cells: reduced costs by rising value, and usage above that of its cheapest cell. Groups of
equal usage differ in their costs alone. How many of them have which scheme decides what they use, so of all
the choices with the same counts only the cheapest matters: where two schemes are open, those that change at
the least cost, and where more are, what a list without equals of their partial choices leaves.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]
"""float64, or Python integers where the search is exact."""
Indices = NDArray[np.int64]


class Item(Protocol):
    """Cells by rising reduced cost (cells,), the first has none; usage above the first's (cells, rows)."""

    @property
    def reduced(self) -> Numbers:
        """The reduced costs, rising."""

    @property
    def usage(self) -> NDArray[Any]:
        """The usage above that of the first cell, per row."""

    @property
    def ends(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The least and the most usage, per row."""

    def chosen(self, cell: int) -> dict[int, int]:
        """Group -> scheme of a cell; groups that are left out keep their cheapest scheme."""


@dataclass(frozen=True, eq=False)
class Group:
    """One open group."""

    index: int
    schemes: Indices
    reduced: Numbers
    usage: NDArray[Any]

    @cached_property
    def levels(self) -> list[Any]:
        """The reduced costs."""
        return list(self.reduced.tolist())

    @cached_property
    def ends(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The least and the most usage, per row."""
        return self.usage.min(axis=0), self.usage.max(axis=0)

    def chosen(self, cell: int) -> dict[int, int]:
        """The group with its scheme."""
        return {self.index: int(self.schemes[cell])}

    def cut(self, limit: Any) -> Group:
        """The cells up to a threshold."""
        count = bisect_right(self.levels, limit)
        if count == len(self.levels):
            return self
        return Group(self.index, self.schemes[:count], self.reduced[:count], self.usage[:count])


@dataclass(frozen=True, eq=False)
class Pairs:
    """Groups of equal usage with the same two schemes open, as an item: a cell is how many of them change.

    `up` are the groups whose cheaper scheme is `schemes[0]`, `down` those with `schemes[1]`, each by what a
    change costs. A cell of `moved` n is the first n of `up` changed; of -n, the first n of `down`.
    """

    schemes: tuple[int, int]
    up: Indices
    down: Indices
    moved: Indices
    reduced: Numbers
    usage: NDArray[Any]

    @cached_property
    def ends(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The least and the most usage, per row."""
        return self.usage.min(axis=0), self.usage.max(axis=0)

    def chosen(self, cell: int) -> dict[int, int]:
        """The groups that change."""
        moved = int(self.moved[cell])
        if moved >= 0:
            return dict.fromkeys(self.up[:moved].tolist(), self.schemes[1])
        return dict.fromkeys(self.down[:-moved].tolist(), self.schemes[0])


def pairs(
    schemes: tuple[int, int], groups: Indices, reduced: Numbers, step: NDArray[Any], limit: Any
) -> Pairs:
    """The item of some groups; `reduced` (groups, 2) are their reduced costs, `step` (rows,) what the second
    scheme uses more than the first. Only sums up to `limit` are offered.
    """
    costs: list[Numbers] = []
    sides: list[Indices] = []
    for side in (0, 1):
        here = np.flatnonzero(np.asarray(reduced[:, side] <= reduced[:, 1 - side], dtype=bool))
        if side:
            here = np.setdiff1d(here, sides[0], assume_unique=True)
        here = here[np.argsort(reduced[here, 1 - side], kind="stable")]
        sums = np.cumsum(reduced[here, 1 - side])
        count = int(np.asarray(sums <= limit, dtype=bool).sum())
        sides.append(here)
        costs.append(sums[:count])
    moved = np.concatenate([[0], np.arange(1, len(costs[0]) + 1), -np.arange(1, len(costs[1]) + 1)])
    zero = np.zeros(1, dtype=reduced.dtype)
    total = np.concatenate([zero, *costs])
    order = np.argsort(total, kind="stable")
    moved = moved[order].astype(np.int64)
    used = moved.astype(step.dtype)[:, None] * step
    return Pairs(schemes, groups[sides[0]], groups[sides[1]], moved, total[order], used)


def alike(usage: list[NDArray[Any]], groups: Indices) -> list[Indices]:
    """The groups in classes of equal usage (up to a constant per row), in the order of their first ones.

    A class may hold others by a rare accident of hashing: what is done with it must be right for any groups.
    """
    random = np.random.default_rng(0)
    key = np.zeros(len(groups), dtype=np.uint64)
    for rows in usage:
        above = rows[groups] - rows[groups, :1]
        if above.dtype == object:
            above = above % 2**61
        weights = random.integers(1, 2**63, above.shape[1], dtype=np.int64).astype(np.uint64)
        with np.errstate(over="ignore"):
            key = key * np.uint64(0x9E3779B97F4A7C15) + above.astype(np.int64).astype(np.uint64) @ weights
    _, first, members = np.unique(key, return_index=True, return_inverse=True)
    if len(first) == len(groups):
        return [groups[i : i + 1] for i in range(len(groups))]
    order = np.argsort(members, kind="stable")
    parts = np.split(groups[order], np.cumsum(np.bincount(members))[:-1])
    return [parts[i] for i in np.argsort(first, kind="stable")]
