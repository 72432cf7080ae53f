"""How often a plan's decisions change when the scores are drawn anew within their standard errors.

All draws are solved side by side: a Lagrangian dual each (Kelley's cutting planes, one linear program over
all draws), then the choice at its prices is repaired and the room that is left is filled. Limits do not
depend on scores, so every plan found is a candidate for every draw, and so is the given one; the best of them
counts. That is near the exact solver, in a fraction of its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.backends import highspy
from search.core import least_open, most_open
from search.problem import Choice, Problem

Floats = NDArray[np.float64]
Choices = NDArray[np.int64]
"""Shape (draws, groups): the scheme of every group."""

CELLS = 600_000
"""Cells of draws that are solved side by side."""
ROUNDS = 40
CLOSE = 1e-5
STEPS = 200
BOX = 1e6
TIE = 1e-12


def stability(
    problem: Problem,
    stderr: Floats,
    choice: Choice,
    draws: int = 200,
    seed: int = 0,
    shared: Mapping[int, Floats] | None = None,
) -> Floats:
    """Shape (groups,): the share of draws whose plan gives a group the scheme that `choice` gives it.

    Every score gets its own normal error; `stderr` (groups, schemes) is 0 where a score is exact. Cells of a
    group in `shared` have scores in common, shape (scores, cells): the standard error of each where a cell
    has it. `choice` must keep the limits.
    """
    generator = np.random.default_rng(seed)
    sign = 1.0 if problem.direction == "min" else -1.0
    kept = np.zeros(len(problem.costs))
    batch = max(1, CELLS // problem.costs.size)
    for start in range(0, draws, batch):
        shape = (min(batch, draws - start), *problem.costs.shape)
        costs = sign * problem.costs + generator.standard_normal(shape) * stderr
        for group, errors in (shared or {}).items():
            drawn = generator.standard_normal((shape[0], len(errors))) @ errors
            costs[:, group, : drawn.shape[1]] += drawn
        kept += (_Draws(problem, costs, choice).plans() == np.asarray(choice)).sum(axis=0)
    return np.asarray(kept / draws)


class _Draws:
    """Draws of one problem in floats: costs (draws, groups, schemes), infinite where nothing is offered.

    Usage (rows, groups, schemes) counts from each group's least and `room` what the limits leave above that,
    both in units of the largest usage step.
    """

    def __init__(self, problem: Problem, costs: Floats, choice: Choice) -> None:
        offered = problem.offered
        self._costs = np.where(offered, costs, np.inf)
        self._given = np.asarray(choice, dtype=np.int64)
        self._groups = np.arange(len(problem.costs))
        usage, room = [], []
        for row in problem.rows:
            used, limit = row.upper()
            least = least_open(used, offered)
            if int(most_open(used, offered).sum()) > limit:
                above = np.where(offered, used - least[:, None], 0).astype(np.float64)
                usage.append(above / (above.max() or 1.0))
                room.append(float(limit - int(least.sum())) / (above.max() or 1.0))
        self._usage = np.array(usage).reshape(len(usage), *problem.costs.shape)
        self._room = np.array(room)
        self._slop = TIE * np.maximum(1.0, np.abs(self._room))

    def plans(self) -> Choices:
        """The plan of every draw."""
        prices = self._prices()
        priced = self._priced(prices)
        found = self._filled(self._repaired(priced.argmin(axis=2), priced))
        fitting = found[(self._slack(found) >= -self._slop).all(axis=1)]
        pool = np.concatenate([self._given[None], np.unique(fitting, axis=0)])
        totals = self._totals(pool)
        totals[0] -= TIE * np.abs(totals[0])
        return np.asarray(pool[totals.argmin(axis=0)])

    def _priced(self, prices: Floats) -> Floats:
        return np.asarray(self._costs + np.einsum("nk,kgs->ngs", prices, self._usage))

    def _totals(self, pool: Choices) -> Floats:
        """Shape (plans, draws): what each plan costs in each draw."""
        draws, groups, schemes = self._costs.shape
        taken = np.zeros((len(pool), groups * schemes))
        np.put_along_axis(taken, pool + self._groups * schemes, 1.0, axis=1)
        costs = np.where(np.isinf(self._costs), 0.0, self._costs).reshape(draws, -1)
        return np.asarray(taken @ costs.T)

    def _slack(self, choices: Choices) -> Floats:
        """Shape (draws, rows)."""
        return np.asarray(self._room - self._usage[:, self._groups, choices].sum(axis=2).T)

    def _prices(self) -> Floats:
        """Shape (draws, rows): where the Lagrangian bound of each draw is largest, nearly."""
        draws, rows = len(self._costs), len(self._room)
        point = np.zeros((draws, rows))
        if not rows:
            return point
        spread = (
            float(
                (
                    np.where(np.isinf(self._costs), -np.inf, self._costs).max(axis=2)
                    - self._costs.min(axis=2)
                ).max()
            )
            or 1.0
        )
        master = _Master(draws, rows)
        best, best_point, active = np.full(draws, -np.inf), point.copy(), np.arange(draws)
        for _ in range(ROUNDS):
            value, slope = self._evaluate(point, active, spread)
            better = value > best[active]
            best[active[better]], best_point[active[better]] = value[better], point[active[better]]
            point, promised = master.next(active, value, slope, point[active])
            active = np.flatnonzero(promised - best > CLOSE * np.maximum(1.0, np.abs(best)))
            if not len(active):
                break
        return best_point * spread

    def _evaluate(self, point: Floats, active: NDArray[np.int64], spread: float) -> tuple[Floats, Floats]:
        """The bound of active draws at their prices, by the largest cost step, and its slope."""
        costs = self._costs[active]
        priced = costs / spread + np.einsum("nk,kgs->ngs", point[active], self._usage)
        chosen = priced.argmin(axis=2)
        slope = -self._slack(chosen)
        value = np.take_along_axis(costs, chosen[:, :, None], axis=2)[:, :, 0].sum(axis=1) / spread
        return value + (slope * point[active]).sum(axis=1), slope

    def _repaired(self, choices: Choices, priced: Floats) -> Choices:
        """Changes one group after the other where a limit is broken, most relief per loss at the prices."""
        for _ in range(STEPS):
            slack = self._slack(choices)
            broken = np.flatnonzero((slack < -self._slop).any(axis=1))
            if not len(broken):
                break
            chosen, left = choices[broken], slack[broken]
            change = self._changes(chosen)
            over = np.maximum(-left, 0.0)[:, :, None, None]
            after = np.maximum(change - left[:, :, None, None], 0.0)
            relief = ((over - after) / np.maximum(TIE, over.sum(axis=1, keepdims=True))).sum(axis=1)
            loss = priced[broken] - np.take_along_axis(priced[broken], chosen[:, :, None], axis=2)
            rated = np.where(np.isfinite(loss) & (relief > TIE), relief / (np.maximum(loss, 0.0) + TIE), -1.0)
            choices = self._moved(choices, broken, rated, rated.max(axis=(1, 2)) > 0)
        return choices

    def _filled(self, choices: Choices) -> Choices:
        """Takes the change of one group that saves most and fits, while there is one."""
        active = np.arange(len(choices))
        for _ in range(STEPS):
            slack, chosen = self._slack(choices[active]), choices[active]
            change = self._changes(chosen)
            fits = (change <= (slack + self._slop)[:, :, None, None]).all(axis=1)
            saved = np.take_along_axis(self._costs[active], chosen[:, :, None], axis=2) - self._costs[active]
            rated = np.where(fits, saved, -1.0)
            gains = rated.max(axis=(1, 2)) > 0
            choices = self._moved(choices, active, rated, gains)
            active = active[gains]
            if not len(active):
                break
        return choices

    def _changes(self, chosen: Choices) -> Floats:
        """Shape (draws, rows, groups, schemes): what each change of one group adds to each usage."""
        here = self._usage[:, self._groups, chosen]
        return np.asarray(self._usage[None] - here.transpose(1, 0, 2)[:, :, :, None])

    def _moved(self, choices: Choices, draws: NDArray[np.int64], rated: Floats, wanted: Any) -> Choices:
        """The choices with the best rated change made in the wanted ones of some draws."""
        best = rated.reshape(len(draws), -1).argmax(axis=1)
        groups, schemes = np.divmod(best, rated.shape[2])
        changed = choices.copy()
        changed[draws[wanted], groups[wanted]] = schemes[wanted]
        return changed


class _Master:
    """Per draw: maximize t under t <= value + slope . (prices - point) of every cut, all in one program."""

    def __init__(self, draws: int, rows: int) -> None:
        self._draws, self._rows = draws, rows
        self._program = highspy.Highs()
        self._program.setOptionValue("output_flag", False)
        self._program.setOptionValue("threads", 1)
        self._program.addVars(draws, np.full(draws, -BOX * BOX), np.full(draws, BOX * BOX))
        self._program.addVars(draws * rows, np.zeros(draws * rows), np.full(draws * rows, BOX))
        self._program.changeColsCost(draws, np.arange(draws, dtype=np.int32), np.full(draws, -1.0))

    def next(
        self, active: NDArray[np.int64], value: Floats, slope: Floats, point: Floats
    ) -> tuple[Floats, Floats]:
        """Adds a cut for each active draw; the next prices and the promised bounds of all draws."""
        width = self._rows + 1
        prices = self._draws + active[:, None] * self._rows + np.arange(self._rows)
        indices = np.concatenate([active[:, None], prices], axis=1).astype(np.int32)
        weights = np.concatenate([np.ones((len(active), 1)), -slope], axis=1)
        upper = value - (slope * point).sum(axis=1)
        starts = np.arange(len(active), dtype=np.int32) * width
        lower = np.full(len(active), -highspy.kHighsInf)
        self._program.addRows(
            len(active), lower, upper, indices.size, starts, indices.ravel(), weights.ravel()
        )
        self._program.run()
        solution = np.array(self._program.getSolution().col_value)
        promised, found = solution[: self._draws], solution[self._draws :]
        return np.clip(found.reshape(self._draws, self._rows), 0.0, BOX), promised
