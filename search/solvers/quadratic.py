"""Local search for the quadratic model: steepest descent by single changes and pair swaps, with restarts.

The problem min x'Gx under a budget is hard in general (CLADO solves it as an integer quadratic program);
swaps keep the budget full, and a few seeded restarts from the best plan so far escape most local minima.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.deadline import Deadline
from search.moves import SWAP_CELLS, Moves, Room, Step, moves_from, promising, random_swap, room_of
from search.pairwise import Floats, PairwiseModel
from search.problem import Choice, Problem, ProblemError

STEPS = 1000
KICKS = 4
GAIN = 1e-12


@dataclass(frozen=True)
class QuadraticAnswer:
    """The best choice found and its predicted value; a local search proves nothing."""

    choice: Choice
    value: float


def solve_quadratic(
    problem: Problem,
    model: PairwiseModel,
    starts: Sequence[Choice],
    *,
    restarts: int = 8,
    seed: int = 0,
    time_limit: float | None = None,
) -> QuadraticAnswer:
    """Minimizes the model within the problem's limits. The same seed gives the same answer.

    `starts` are feasible choices, such as the additive optimum; the answer is never worse than any of them.
    Raises ProblemError when there is none or one breaks a limit.
    """
    if not starts or not all(problem.feasible(start) for start in starts):
        raise ProblemError(
            "The quadratic search must start from feasible choices. Got none, or one that is not."
        )
    room, deadline, random = room_of(problem), Deadline.after(time_limit), np.random.default_rng(seed)
    best = min((descend(room, model, start, deadline) for start in starts), key=model.value)
    for _ in range(restarts):
        if deadline.passed():
            break
        tried = descend(room, model, _kicked(room, best, random), deadline)
        if model.value(tried) < model.value(best):
            best = tried
    return QuadraticAnswer(best, model.value(best))


def descend(room: Room, model: PairwiseModel, choice: Choice, deadline: Deadline) -> Choice:
    """Takes the best improving single change, else the best improving swap, until there is none."""
    for _ in range(STEPS):
        moves = moves_from(room, choice)
        singles, slack = model.singles(moves), room.slack(choice)
        step = _best_single(moves, singles, slack) or _best_pair(model, moves, singles, slack)
        if step is None or deadline.passed():
            return choice
        choice = moves.apply(step)
    return choice


def _best_single(moves: Moves, singles: Floats, slack: Sequence[int]) -> Step | None:
    gains = np.where(moves.singles_fit(slack), singles, 0.0)
    return (int(gains.argmin()),) if gains.min(initial=0.0) < -_least_gain(singles) else None


def _best_pair(model: PairwiseModel, moves: Moves, singles: Floats, slack: Sequence[int]) -> Step | None:
    cells = promising(singles, SWAP_CELLS)
    gains = np.where(moves.pairs_fit(cells, slack), model.pairs(moves, cells, singles), 0.0)
    if gains.min(initial=0.0) >= -_least_gain(singles):
        return None
    first, second = np.unravel_index(int(gains.argmin()), gains.shape)
    return int(cells[first]), int(cells[second])


def _kicked(room: Room, choice: Choice, random: np.random.Generator) -> Choice:
    """A few random feasible swaps away."""
    for _ in range(KICKS):
        swapped = random_swap(room, choice, random)
        if swapped is None:
            return choice
        choice = swapped
    return choice


def _least_gain(singles: Floats) -> float:
    """Differences below this are rounding."""
    return GAIN * float(np.abs(singles).max(initial=0.0))
