"""Several metrics in one weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from search.compile import Compiled
from search.covers import Quantity
from search.objectives.objective import (
    Entry,
    Floats,
    How,
    ObjectiveError,
    Optimum,
    Part,
    costs_of,
    distinct,
    listed,
    metric_of,
    short,
)
from search.problem import Solution

EXAMPLE = "weighted: output_kl=1, sqnr=0.01"


@dataclass(frozen=True)
class Weighted:
    """Smaller is better: a metric to be maximized counts with its weight turned negative. `normalized`: every
    metric is divided by the range from its smallest to its largest total over all offered choices.
    """

    weights: tuple[tuple[str, float], ...]
    normalized: bool = False

    @property
    def text(self) -> str:
        """With the weights as short as they read back."""
        name = "weighted_normalized" if self.normalized else "weighted"
        return f"{name}: " + ", ".join(f"{metric}={short(weight)}" for metric, weight in self.weights)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that have a weight."""
        return tuple(metric for metric, _ in self.weights)

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem as it is."""
        return compiled

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """One additive program over the weighted costs."""
        costs = {name: costs_of(compiled, name) for name in self.metrics}
        scales = {name: self._scale(compiled, name, values) for name, values in costs.items()}
        mixed = sum((scales[name] * values for name, values in costs.items()), np.zeros(()))
        solution = how.solve(replace(compiled.problem, costs=np.asarray(mixed), direction="min"))
        return Optimum(solution, totals(costs, solution))

    def _scale(self, compiled: Compiled, name: str, costs: Floats) -> float:
        """What a metric is multiplied by."""
        sign = 1.0 if metric_of(compiled, name).direction == "min" else -1.0
        weight = sign * dict(self.weights)[name]
        return weight / (_range(compiled, name, costs) or 1.0) if self.normalized else weight


def totals(costs: dict[str, Floats], solution: Solution) -> tuple[Part, ...]:
    """Each metric's own total, about which nothing is proven by itself."""
    if solution.choice is None:
        return ()
    return tuple(
        Part(name, math.fsum(values[np.arange(len(solution.choice)), list(solution.choice)]))
        for name, values in costs.items()
    )


def _range(compiled: Compiled, name: str, costs: Floats) -> float:
    """From the smallest to the largest total; of covers those count too that the problem left out."""
    combined = [one.ranges[Quantity("score", name)] for one in compiled.covers.values()]
    spread = sum(float(ends[1] - ends[0]) for ends in combined if ends is not None)
    alone = [group for group in range(len(costs)) if group not in compiled.covers]
    filled = costs[alone][~np.isnan(costs[alone]).all(axis=1)]
    return spread + float(
        (np.nanmax(filled, axis=1) - np.nanmin(filled, axis=1)).sum() if len(filled) else 0.0
    )


def _read(name: str, arguments: str) -> Weighted:
    pairs = [_pair(name, text) for text in listed(name, arguments, 1, EXAMPLE)]
    distinct(name, [metric for metric, _ in pairs])
    _require_weight(name, pairs)
    return Weighted(tuple(pairs), normalized=name == "weighted_normalized")


def _pair(name: str, text: str) -> tuple[str, float]:
    metric, sign, number = (part.strip() for part in text.rpartition("="))
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (sign and metric and 0 <= weight <= 1e12):
        raise ObjectiveError(
            f"A weight of {name} must be written METRIC=NUMBER, from 0 to 1e12, as in {EXAMPLE!r}."
            f" Got {text!r:.80}."
        )
    return metric, weight


def _require_weight(name: str, pairs: Sequence[tuple[str, float]]) -> None:
    if not any(weight for _, weight in pairs):
        raise ObjectiveError(f"A weight of {name} must be more than 0. Got zeros alone.")


WEIGHTED = Entry(
    "weighted",
    "Several metrics in one weighted sum, each in its own unit and direction; exact.",
    (EXAMPLE,),
    lambda arguments: _read("weighted", arguments),
    names_all=True,
)
WEIGHTED_NORMALIZED = Entry(
    "weighted_normalized",
    "The weighted sum of metrics divided by the range of their totals, smallest to largest; exact.",
    ("weighted_normalized: output_kl=1, weight_error=0.5",),
    lambda arguments: _read("weighted_normalized", arguments),
    names_all=True,
)
