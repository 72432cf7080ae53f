"""Single changes and pair swaps around a choice, and which of them keep the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.problem import Choice, IntMatrix, Problem

Step = tuple[int, ...]
"""Indices into Moves: one for a single change, two for a swap."""


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


def _fits(usage: list[NDArray[Any]], slack: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    fits = np.ones(shape, dtype=bool)
    for change, left in zip(usage, slack, strict=True):
        fits &= np.asarray(change <= left, dtype=bool)
    return fits
