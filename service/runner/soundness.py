"""How sound each stored metric is by itself: its cost, whether its samples agree, what they tell apart."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import numpy as np

from sensitivity.catalog import SCORERS
from sensitivity.contexts import without_context
from sensitivity.ranks import split_half
from service.draws import Draws
from service.records import ScoreRecord
from service.runner.lab import Choices, Lab

CERTAIN = 1.96
"""Standard errors of a difference beyond which it is taken for real."""


@dataclass(frozen=True)
class Soundness:
    """Of one metric; None where there are no samples, or they were not kept.

    forwards     what it cost, in forward passes of one sample
    stability    reliability of the order of its scores: two halves of the samples, stepped up
    resolved     share of the pairs of schemes of one layer that its paired samples tell apart
    """

    forwards: float | None
    stability: float | None
    resolved: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(vars(self))


def soundness(lab: Lab, choices: Choices, metrics: Collection[str], seed: int) -> dict[str, Soundness]:
    """By metric, over the stored scores of `choices`."""
    draws = lab.draws()
    stored: dict[str, list[ScoreRecord]] = {metric: [] for metric in metrics}
    for record in lab.scores(metrics):
        if record.scheme in choices.get(record.layer, ()):
            stored[record.metric].append(record)
    return {
        metric: Soundness(lab.spent(records), _stability(draws, records, seed), _resolved(draws, records))
        for metric, records in stored.items()
    }


def together(found: dict[str, Soundness], metrics: Sequence[str]) -> float | None:
    """The forward passes of several metrics: those of single choices share theirs, blocks add up."""
    costs = {metric: found[metric].forwards for metric in metrics}
    known = [cost for cost in costs.values() if cost is not None]
    if len(known) < len(costs):
        return None
    units = {name: SCORERS[without_context(name)].unit for name in costs}
    shared = [cost for name, cost in costs.items() if cost and units[name] == "choice"]
    own = [cost for name, cost in costs.items() if cost and units[name] == "block"]
    return max(shared, default=0.0) + sum(own)


def _by_layer(records: Sequence[ScoreRecord]) -> list[list[ScoreRecord]]:
    ordered = sorted(records, key=lambda record: record.layer)
    return [list(group) for _, group in groupby(ordered, key=lambda record: record.layer)]


def _stability(draws: Draws, records: Sequence[ScoreRecord], seed: int) -> float | None:
    blocks = []
    for group in _by_layer(records):
        columns = [draws.of(record) for record in group]
        if any(column is None for column in columns):
            return None
        blocks.append(np.stack([np.asarray(column) for column in columns], axis=1))
    return split_half(*blocks, seed=seed)


def _resolved(draws: Draws, records: Sequence[ScoreRecord]) -> float | None:
    told = []
    for group in _by_layer(records):
        for one, two in combinations(group, 2):
            difference, stderr = draws.difference(one, two)
            if stderr is None:
                return None
            told.append(abs(difference) > CERTAIN * stderr)
    return float(np.mean(told)) if told else None
