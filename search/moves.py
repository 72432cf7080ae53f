"""Single changes, pair swaps and three-way moves around a choice, and which of them keep the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.problem import Choice, IntMatrix, Problem

SWAP_CELLS = 300
"""At most so many single changes are paired."""
TRIPLE_CELLS = 48
"""At most so many single changes are taken three at a time."""

Step = tuple[int, ...]
"""Indices into Moves: one for a single change, two for a swap, three for a three-way move."""


@dataclass(frozen=True, eq=False)
class Room:
    """What choices may use: open cells (groups, schemes), usage per row, "at most" limits."""

    open: NDArray[np.bool_]
    usage: tuple[IntMatrix, ...]
    limit: tuple[int, ...]

    def slack(self, choice: Choice) -> list[int]:
        """What is left of each limit; negative where it is broken."""
        pairs = zip(self.usage, self.limit, strict=True)
        return [limit - sum(int(rows[g, c]) for g, c in enumerate(choice)) for rows, limit in pairs]


@dataclass(frozen=True, eq=False)
class Moves:
    """Every change of one group to another open cell, seen from `choice`: one array entry per change."""

    choice: Choice
    group: NDArray[np.int64]
    scheme: NDArray[np.int64]
    usage: tuple[NDArray[Any], ...]

    def apply(self, step: Step) -> Choice:
        """The choice after a step."""
        changed = list(self.choice)
        for index in step:
            changed[int(self.group[index])] = int(self.scheme[index])
        return tuple(changed)

    def singles_fit(self, slack: Sequence[int]) -> NDArray[np.bool_]:
        """Shape (changes,): the changes that keep every limit on their own."""
        return _fits(list(self.usage), slack, self.group.shape)

    def pairs_fit(self, cells: NDArray[np.int64], slack: Sequence[int]) -> NDArray[np.bool_]:
        """Shape (cells, cells): the pairs of two groups' changes that keep every limit together."""
        group = self.group[cells]
        usage = [rows[cells][:, None] + rows[cells][None, :] for rows in self.usage]
        fits = _fits(usage, slack, (len(cells), len(cells)))
        fits &= group[:, None] != group[None, :]
        return fits

    def triples(self, cells: NDArray[np.int64], slack: Sequence[int]) -> NDArray[np.int64]:
        """Shape (n, 3): the positions in `cells` of three groups' changes that keep every limit together."""
        found = _threes(len(cells))
        one, two, three = self.group[cells][found].T
        usage = [rows[cells][found].sum(axis=1) for rows in self.usage]
        fits = _fits(usage, slack, (len(found),)) & (one != two) & (one != three) & (two != three)
        return np.asarray(found[fits])


def room_of(problem: Problem) -> Room:
    """The limits of a problem, all as "at most"; those that cannot bind are left out."""
    rows = [row.upper() for row in problem.rows]
    binding = [(usage, limit) for usage, limit in rows if int(usage.max(axis=1).sum()) > limit]
    usages, limits = tuple(usage for usage, _ in binding), tuple(limit for _, limit in binding)
    return Room(problem.offered, usages, limits)


def moves_from(room: Room, choice: Choice) -> Moves:
    """All single changes from a choice."""
    others = room.open.copy()
    others[np.arange(len(choice)), choice] = False
    group, scheme = np.nonzero(others)
    here = np.asarray(choice)[group]
    return Moves(choice, group, scheme, tuple(rows[group, scheme] - rows[group, here] for rows in room.usage))


def promising(delta: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """At most `most` changes for pairing: half the cheapest losses, half the largest gains for their size."""
    if len(delta) <= most:
        return np.arange(len(delta))
    order = np.argsort(np.abs(delta), kind="stable")
    gains, losses = order[delta[order] < 0], order[delta[order] >= 0]
    return np.concatenate([gains[: most // 2], losses[: most // 2]])


def worthwhile(moves: Moves, delta: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """At most `most` changes to combine, in the order of what they add at the price of the room they use.

    Half of them use room and half free it. The price lies between the largest gain for a change's room and
    the smallest loss for it, so that the changes of a good trade come first.
    """
    if len(delta) <= most:
        return np.arange(len(delta))
    room = np.zeros(len(delta))
    for change in moves.usage:
        floats = change.astype(np.float64)
        room += floats / (np.abs(floats).mean() or 1.0)
    gains, losses = -delta[(room > 0) & (delta < 0)], delta[(room < 0) & (delta > 0)]
    best = float((gains / room[(room > 0) & (delta < 0)]).max(initial=0.0))
    least = float((losses / -room[(room < 0) & (delta > 0)]).min(initial=np.inf))
    price = best if np.isinf(least) else (best + least) / 2
    order = np.argsort(delta + price * room, kind="stable")
    uses, frees = order[room[order] > 0], order[room[order] <= 0]
    taken = max(most // 2, most - len(frees))
    return np.concatenate([uses[:taken], frees[: most - min(taken, len(uses))]])


def random_swap(room: Room, choice: Choice, random: np.random.Generator) -> Choice | None:
    """One random pair of changes away within the limits, None where no pair fits."""
    moves = moves_from(room, choice)
    cells = random.permutation(len(moves.group))[:SWAP_CELLS]
    first, second = np.nonzero(moves.pairs_fit(cells, room.slack(choice)))
    if not len(first):
        return None
    pick = int(random.integers(len(first)))
    return moves.apply((int(cells[first[pick]]), int(cells[second[pick]])))


def _fits(usage: list[NDArray[Any]], slack: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    fits = np.ones(shape, dtype=bool)
    for change, left in zip(usage, slack, strict=True):
        fits &= np.asarray(change <= left, dtype=bool)
    return fits


@lru_cache(maxsize=8)
def _threes(count: int) -> NDArray[np.int64]:
    found = np.array(list(combinations(range(count), 3)), dtype=np.int64).reshape(-1, 3)
    found.setflags(write=False)
    return found
