"""Metric decoupling (MixDQ, Zhao et al. 2024; ViDiT-Q, Zhao et al. 2024): each layer is judged by the metric
of its role.

Metrics differ in unit and direction, so scores of different metrics are never added as they are. A score
here is the part of what its metric can lose among the layers it decides: 0 where all of them have their best
scheme, 1 where all have their worst.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from quant.layers import Layer, Role
from quant.patterns import matches, select
from sensitivity.catalog import DECOUPLED, SCORERS
from sensitivity.units import ScoreRow

ROLES: tuple[str, ...] = get_args(Role)
CONTENT_ROLES = ("cross_attention", "feed_forward", "expert")
"""Layers that decide what is in the output; the others decide how well it is drawn."""
CONTENT_METRICS = ("ssim", "output_kl")
"""What decides content layers: the first one that the task offers."""
QUALITY_METRIC = "sqnr"


class MetricDecoupled:
    """Says which metric decides which layer, and puts their scores on one scale."""

    def decide(
        self, layers: Sequence[Layer], offered: Collection[str], chosen: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Layer -> the metric that decides it. `chosen` maps roles, layers or patterns of them to metrics.

        A layer's own name goes before patterns, a later pattern before an earlier one, patterns before roles.
        Raises PatternError for a key that is no role and matches no layer.
        """
        chosen = chosen or {}
        names = [name for layer in layers for name in layer.names]
        select([key for key in chosen if key not in ROLES], names)
        return {layer.name: _metric_of(layer, offered, chosen) for layer in layers}

    def combine(self, rows: Iterable[ScoreRow], decided: Mapping[str, str]) -> tuple[ScoreRow, ...]:
        """The rows of this metric from those of the metrics that decide; other rows are passed over."""
        signs = {name: 1.0 if SCORERS[name].direction == "min" else -1.0 for name in set(decided.values())}
        deciding = [row for row in rows if decided.get(row.layer) == row.metric]
        best: dict[str, float] = {}
        worst: dict[str, float] = {}
        for row in deciding:
            cost = signs[row.metric] * row.value
            best[row.layer] = min(cost, best.get(row.layer, cost))
            worst[row.layer] = max(cost, worst.get(row.layer, cost))
        spans = {
            metric: sum(worst[name] - best[name] for name in best if decided[name] == metric) or 1.0
            for metric in set(decided.values())
        }
        return tuple(
            replace(
                row,
                metric=DECOUPLED,
                value=(signs[row.metric] * row.value - best[row.layer]) / spans[row.metric],
                stderr=None if row.stderr is None else row.stderr / spans[row.metric],
                draws=None
                if row.draws is None
                else (signs[row.metric] * row.draws - best[row.layer]) / spans[row.metric],
            )
            for row in deciding
        )


def _metric_of(layer: Layer, offered: Collection[str], chosen: Mapping[str, str]) -> str:
    for name in layer.names:
        if name in chosen:
            return chosen[name]
    patterns = [key for key in chosen if key not in ROLES and any(matches(key, name) for name in layer.names)]
    if patterns:
        return chosen[patterns[-1]]
    if layer.role in chosen:
        return chosen[layer.role]
    if layer.role in CONTENT_ROLES:
        return next((name for name in CONTENT_METRICS if name in offered), QUALITY_METRIC)
    return QUALITY_METRIC
