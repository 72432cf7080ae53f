"""Plans that fill the budget, anywhere or near one of them: what score models are judged on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from search.deadline import Deadline
from search.moves import Room, moves_from, random_swap, room_of
from search.polish import repair
from search.problem import Choice, Problem
from search.solve import solve

TRIES_PER_PLAN = 20
SWAPS = 3


def random_plans(problem: Problem, count: int, *, seed: int = 0) -> tuple[Choice, ...]:
    """Up to `count` different feasible choices in which nothing can be raised any more.

    Drawn by starting anywhere, repairing broken limits and raising random groups while a "<=" limit has
    room. Fewer come back where there are no more (none if nothing is feasible). The same seed gives the
    same plans.
    """
    room, random = room_of(problem), np.random.default_rng(seed)
    plans: dict[Choice, None] = {}
    for _ in range(count * TRIES_PER_PLAN):
        if len(plans) == count:
            break
        start = _feasible(problem, room, random)
        if start is None:
            return ()
        plans[_filled(problem, room, start, random)] = None
    return tuple(plans)


def near_plans(problem: Problem, start: Choice, count: int, *, seed: int = 0) -> tuple[Choice, ...]:
    """Up to `count` different feasible choices, `start` not among them, one to three random swaps of two
    groups away from it and filled up as `random_plans` are. The same seed gives the same plans.
    """
    room, random = room_of(problem), np.random.default_rng(seed)
    plans: dict[Choice, None] = {}
    for _ in range(count * TRIES_PER_PLAN):
        if len(plans) == count:
            break
        plan = start
        for _ in range(int(random.integers(1, SWAPS + 1))):
            plan = random_swap(room, plan, random) or plan
        plan = _filled(problem, room, plan, random)
        if plan != start:
            plans[plan] = None
    return tuple(plans)


def _feasible(problem: Problem, room: Room, random: np.random.Generator) -> Choice | None:
    costs = random.random(problem.costs.shape)
    if not room.open.any(axis=1).all():
        return None
    anywhere = tuple(int(i) for i in np.where(room.open, costs, -1.0).argmax(axis=1))
    repaired = repair(room, anywhere, random.random(problem.costs.shape), Deadline())
    if repaired is not None:
        return repaired
    return solve(replace(problem, costs=np.where(room.open, costs, np.nan)), gap=0.1).choice


def _filled(problem: Problem, room: Room, choice: Choice, random: np.random.Generator) -> Choice:
    """Raises random groups until no change fits that uses more of a "<=" resource."""
    upper = [row.usage for row in problem.rows if row.relation == "<="]
    raised = _raises(room, upper, choice, random)
    while raised is not None:
        choice = raised
        raised = _raises(room, upper, choice, random)
    return choice


def _raises(
    room: Room, upper: list[NDArray[np.int64]], choice: Choice, random: np.random.Generator
) -> Choice | None:
    moves = moves_from(room, choice)
    here = np.asarray(choice)[moves.group]
    more = np.zeros(len(here), dtype=bool)
    less = np.zeros(len(here), dtype=bool)
    for usage in upper:
        change = usage[moves.group, moves.scheme] - usage[moves.group, here]
        more |= np.asarray(change > 0, dtype=bool)
        less |= np.asarray(change < 0, dtype=bool)
    fitting = np.flatnonzero(moves.singles_fit(room.slack(choice)) & more & ~less)
    return moves.apply((int(random.choice(fitting)),)) if len(fitting) else None
