"""A metric measured only for choices near a decision, elsewhere calibrated from a cheap one. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from search.boundary import near_decision
from search.compile import Compiled
from search.solve import solve
from sensitivity.calibrated import Calibrated, calibrated
from sensitivity.table import MetricTable, ScoreTable
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.planning.question import compile_ask

ROUNDS = 6
"""Each round measures what the round before made likely; two or three are usual."""
FIRST_SHARE = 0.35
"""Share of the choices that one budget has measured, about (docs/metrics.md)."""


def share_measured(budgets: int) -> float:
    """The share of the choices that a cascade is expected to measure.

    >>> [round(share_measured(count), 2) for count in (1, 2, 5)]
    [0.35, 0.58, 0.88]
    """
    return 1 - (1 - FIRST_SHARE) ** budgets


def with_calibrated(inputs: PlanningInputs, cheap: str, refined: str) -> PlanningInputs:
    """The inputs with the gaps of `refined` filled from `cheap`; both are metrics of the table."""
    found = _calibrated(inputs.table, cheap, refined)
    old = inputs.table.metrics[refined]
    known = np.full(found.values.shape, np.nan) if old.stderr is None else old.stderr
    guessed = np.abs(found.high - found.low) / 4  # the interval is two standard errors each way
    filled = MetricTable(
        old.direction,
        found.values,
        np.where(found.measured, known, guessed),
        np.where(found.measured, refined, f"{cheap}, calibrated"),
    )
    table = replace(inputs.table, metrics={**inputs.table.metrics, refined: filled})
    return replace(inputs, table=table, calibrated={**inputs.calibrated, refined: cheap})


def undecided(inputs: PlanningInputs, cheap: str, refined: str, asks: Sequence[Ask]) -> dict[str, list[str]]:
    """Layer -> schemes that have no score in `refined` and lie near a decision at one of the budgets."""
    found = _calibrated(inputs.table, cheap, refined)
    filled = with_calibrated(inputs, cheap, refined)
    near = np.zeros(found.values.shape, dtype=bool)
    for ask in asks:
        near |= _near(compile_ask(filled, replace(ask, metric=refined)), ask, found)
    missing = near & ~found.measured & ~np.isnan(found.values)
    names = inputs.table.layer_names
    return {
        names[row]: [inputs.table.schemes[column] for column in np.flatnonzero(missing[row])]
        for row in np.flatnonzero(missing.any(axis=1))
    }


def _calibrated(table: ScoreTable, cheap: str, refined: str) -> Calibrated:
    return calibrated(table.metrics[cheap].values, table.metrics[refined].values)


def _near(compiled: Compiled, ask: Ask, found: Calibrated) -> NDArray[np.bool_]:
    """Shape of the table: the cells of every group whose choice is near a decision."""
    problem = compiled.problem
    near = np.zeros(found.values.shape, dtype=bool)
    solution = solve(problem, gap=ask.gap, time_limit=ask.time_limit_seconds)
    if solution.choice is None:
        return near
    low, high = (_summed(matrix, compiled.groups) for matrix in (found.low, found.high))
    chosen = near_decision(problem, low, high, solution.choice, ask.time_limit_seconds)
    for group, layers in enumerate(compiled.groups):
        near[list(layers)] = chosen[group]
    return near


def _summed(matrix: NDArray[np.float64], groups: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    return np.array([matrix[list(layers)].sum(axis=0) for layers in groups])
