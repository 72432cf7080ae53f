"""Scores with their errors: mean + k standard errors of each (layer, scheme).

The errors of layers are added, as if all scores were wrong the same way at once; independent errors would
add up to less, so this is conservative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from search.compile import Compiled
from search.objectives.objective import (
    Entry,
    How,
    ObjectiveError,
    Optimum,
    costs_of,
    errors_of,
    short,
)
from search.objectives.weighted import totals


@dataclass(frozen=True)
class Uncertainty:
    """`errors` standard errors are added to every score (taken off where more is better)."""

    errors: float
    metrics: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """With its number of standard errors."""
        return f"uncertainty: {short(self.errors)}"

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem as it is."""
        return compiled

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """One additive program over the raised costs. Raises ObjectiveError without standard errors."""
        known = errors_of(compiled, compiled.metric)
        if not np.isfinite(known[compiled.problem.offered]).all():
            raise ObjectiveError(
                f"The objective uncertainty must have a standard error for every score of {compiled.metric}."
                " Got some without. Take a metric that has them, or the objective sum."
            )
        sign = 1.0 if compiled.problem.direction == "min" else -1.0
        mean = costs_of(compiled, compiled.metric)
        solution = how.solve(replace(compiled.problem, costs=mean + sign * self.errors * known))
        return Optimum(solution, totals({"mean": mean, "standard errors": known}, solution))


def _read(arguments: str) -> Uncertainty:
    try:
        errors = float(arguments)
    except ValueError:
        errors = math.nan
    if not 0 <= errors <= 1000:
        raise ObjectiveError(
            "The objective uncertainty must say how many standard errors count, from 0 to 1000, as in"
            f" 'uncertainty: 2'. Got {arguments!r:.80}."
        )
    return Uncertainty(errors)


UNCERTAINTY = Entry(
    "uncertainty",
    "The sum of mean + k standard errors of every score; conservative, since errors are added; exact.",
    ("uncertainty: 2",),
    _read,
)
