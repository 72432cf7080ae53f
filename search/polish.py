"""Cheap feasible answers: repair what breaks a limit, then fill the room that is left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from search.core import Core, unit_floats
from search.deadline import Deadline
from search.moves import Moves, Room, Step, moves_from, promising
from search.problem import Choice

STEPS = 400
SWAP_CELLS = 300
GAIN = 1e-13
GRACE_SECONDS = 0.1


def polish(core: Core, choice: Choice, deadline: Deadline) -> Choice | None:
    """A feasible choice near `choice`, no worse than it if it was feasible; None if repair fails."""
    costs, _ = unit_floats(core.cost, core.open)
    room = Room(core.open, core.usage, core.limit)
    current = repair(room, choice, costs, deadline.at_least(GRACE_SECONDS))
    if current is None:
        return None
    for _ in range(STEPS):
        moves, slack = moves_from(room, current), room.slack(current)
        delta = _deltas(moves, costs)
        step = _best_single(moves, delta, slack) or _best_pair(moves, delta, slack)
        if step is None or deadline.passed():
            break
        changed = moves.apply(step)
        if core.total(changed) >= core.total(current):
            break
        current = changed
    return current


def repair(room: Room, choice: Choice, costs: NDArray[np.float64], deadline: Deadline) -> Choice | None:
    """Changes groups until no limit is broken, most relief per cost first; None when stuck."""
    for _ in range(2 * len(choice) + 20):
        slack = room.slack(choice)
        if all(left >= 0 for left in slack):
            return choice
        moves = moves_from(room, choice)
        relief = _relief(moves, slack)
        if not relief.max(initial=0) > 0 or deadline.passed():
            return None
        price = np.maximum(_deltas(moves, costs), 0.0) + 1e-9
        rated = np.where(relief > 0, relief / price, -1.0)
        choice = moves.apply((int(rated.argmax()),))
    return None


def _relief(moves: Moves, slack: list[int]) -> NDArray[np.float64]:
    """How much each move reduces the summed relative violation."""
    relief = np.zeros(len(moves.group))
    for change, left in zip(moves.usage, slack, strict=True):
        after = np.maximum(change.astype(object) - left, 0)
        relief += (max(-left, 0) - after).astype(np.float64) / float(abs(left) or 1)
    return relief


def _deltas(moves: Moves, costs: NDArray[np.float64]) -> NDArray[np.float64]:
    here = np.asarray(moves.choice)[moves.group]
    return np.asarray(costs[moves.group, moves.scheme] - costs[moves.group, here])


def _best_single(moves: Moves, delta: NDArray[np.float64], slack: list[int]) -> Step | None:
    gains = np.where(moves.singles_fit(slack), delta, 0.0)
    return (int(gains.argmin()),) if gains.min(initial=0.0) < -GAIN else None


def _best_pair(moves: Moves, delta: NDArray[np.float64], slack: list[int]) -> Step | None:
    cells = promising(delta, SWAP_CELLS)
    gains = np.where(moves.pairs_fit(cells, slack), delta[cells][:, None] + delta[cells][None, :], 0.0)
    if gains.min(initial=0.0) >= -GAIN:
        return None
    first, second = np.unravel_index(int(gains.argmin()), gains.shape)
    return int(cells[first]), int(cells[second])
