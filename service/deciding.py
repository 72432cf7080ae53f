"""What decides a job's plans: its metrics, the metric of each layer, the contexts that split scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.layers import Inventory
from quant.patterns import PatternError
from sensitivity.catalog import DECOUPLED, SCORERS, with_interactions
from sensitivity.contexts import (
    LEAST_SAMPLES,
    classes_of,
    context_of,
    in_context,
    members,
    timestep_ranges,
    without_context,
)
from sensitivity.spec import PARTS
from sensitivity.units import ScoreRow
from service.errors import Unprocessable
from service.records import ScoreRecord

EACH, MAXIMUM = "each", "maximum"


def deciding_metric(request: Mapping[str, Any]) -> str:
    """The metric whose sum the plans of a request, its members as JSON, minimize: the refining one, else the
    first.
    """
    return str(request.get("refine_metric") or request["metrics"][0])


@dataclass(frozen=True)
class Deciding:
    """What is measured for a job, and how a score table is made of it.

    metrics   those of the job, the deciding one first
    decided   layer -> the metric of its role; empty without metric_decoupled
    contexts  that scores are split by; () for all samples together
    plans     "weighted" or "maximum" over the contexts, or "each": a plan per context
    weights   of contexts in a weighted plan; 1 where there is none
    """

    metrics: tuple[str, ...]
    decided: Mapping[str, str] = field(default_factory=dict)
    contexts: tuple[str, ...] = ()
    plans: str = "weighted"
    weights: Mapping[str, float] = field(default_factory=dict)

    def measured(self, layer: str) -> tuple[str, ...]:
        """The metrics that are measured for a layer, by context where there are contexts.

        >>> deciding = Deciding(("metric_decoupled", "gram_output"), {"a": "ssim"}, ("0", "1"))
        >>> deciding.measured("a")
        ('ssim@0', 'ssim@1', 'gram_output')
        """
        own = (self.decided[layer] if name == DECOUPLED else name for name in self.metrics)
        return tuple(dict.fromkeys(name for metric in own for name in self._by_context(metric)))

    @property
    def all_measured(self) -> list[str]:
        """The metrics that are measured for any layer."""
        deciding = sorted(set(self.decided.values()))
        own = (name for metric in self.metrics for name in (deciding if metric == DECOUPLED else [metric]))
        return list(dict.fromkeys(name for metric in own for name in self._by_context(metric)))

    @property
    def table_metrics(self) -> tuple[str, ...]:
        """The metrics of the score table: those of the job, one for each context where each has its plan."""
        if self.plans != EACH:
            return self.metrics
        return tuple(name for metric in self.metrics for name in self._by_context(metric))

    def compared(self, metric: str) -> tuple[str, ...]:
        """The metric by context, where the worst context's sum decides; () elsewhere."""
        if self.plans != MAXIMUM or metric == DECOUPLED or len(self.contexts) < 2:
            return ()
        return self._by_context(metric) if metric in self.metrics and SCORERS[metric].by_context else ()

    @property
    def planned_by(self) -> tuple[str, ...]:
        """The metrics that every budget is planned by: the first one, or that of each context."""
        first = self.metrics[0]
        return self._by_context(first) if self.plans == EACH else (first,)

    def rows(self, scores: Iterable[ScoreRow | ScoreRecord]) -> list[ScoreRow]:
        """The table's scores, made of the measured ones."""
        plain = [ScoreRow(s.layer, s.scheme, s.metric, s.value, s.stderr, s.samples) for s in scores]
        if not self.contexts:
            return [*plain, *self._decoupled(plain)]
        if self.plans == EACH:
            return [*plain, *(row for name in self.contexts for row in self._decoupled(plain, name))]
        one = [*plain, *_over_contexts(plain, self)]
        return [*one, *self._decoupled(one)]

    def chosen(self, facts: Mapping[str, Any], part: str) -> dict[str, NDArray[np.bool_]]:
        """Context -> which samples of a part are in it. `facts` are those of an inspection."""
        classes, steps = ((facts.get(name) or {}).get(part) for name in ("contexts", "timesteps"))
        return {name: members(name, classes, steps) for name in self.contexts}

    def weight(self, context: str) -> float:
        """The weight of a context, as a part of all weights."""
        return self.weights.get(context, 1.0) / sum(self.weights.get(name, 1.0) for name in self.contexts)

    def _by_context(self, metric: str) -> tuple[str, ...]:
        if not SCORERS[metric].by_context or not self.contexts:
            return (metric,)
        return tuple(in_context(metric, name) for name in self.contexts)

    def _decoupled(self, rows: Sequence[ScoreRow], context: str | None = None) -> list[ScoreRow]:
        if DECOUPLED not in self.metrics:
            return []
        plain = [
            _renamed(row, without_context(row.metric)) for row in rows if context_of(row.metric) == context
        ]
        found = SCORERS[DECOUPLED].load().combine(plain, self.decided)
        return [row if context is None else _renamed(row, in_context(DECOUPLED, context)) for row in found]


def scored_metrics(metrics: Sequence[str], refined: str | None, *, interactions: bool) -> list[str]:
    """The metrics that every choice of a job is measured in: its own and, unless it declines or refines,
    interactions.

    >>> scored_metrics(["output_kl"], None, interactions=True)
    ['output_kl', 'gram_output']
    """
    return with_interactions(metrics) if interactions and refined is None else list(metrics)


def deciding_of(
    request: Mapping[str, Any], metrics: Sequence[str], inventory: Inventory, facts: Mapping[str, Any]
) -> Deciding:
    """What decides a job of this request. `facts` are those of an inspection, or of a job's summary.

    Raises Unprocessable for a pattern that matches nothing, a metric that is not offered, and contexts that
    the data do not have.
    """
    wanted = request.get("contexts") or {}
    contexts = _contexts(wanted, facts)
    unknown = [name for name in wanted.get("weights", {}) if name not in contexts]
    if unknown:
        raise Unprocessable(
            "unknown-context",
            f"Weights must be of contexts: {', '.join(contexts)}. Got {unknown[0]!r:.80}.",
            pointer="/contexts/weights",
        )
    weights = dict(wanted.get("weights", {}))
    if contexts and not any(weights.get(name, 1.0) for name in contexts):
        raise Unprocessable(
            "unknown-context",
            f"A weight must be more than 0. Got 0 for every context: {', '.join(contexts)}. Raise one.",
            pointer="/contexts/weights",
        )
    return Deciding(
        tuple(metrics),
        decided_by(request, metrics, inventory, facts),
        contexts,
        wanted.get("plans", "weighted"),
        weights,
    )


def decided_by(
    request: Mapping[str, Any], metrics: Sequence[str], inventory: Inventory, facts: Mapping[str, Any]
) -> dict[str, str]:
    """Layer -> the metric of its role; empty unless metric_decoupled is one of the metrics."""
    if DECOUPLED not in metrics:
        return {}
    offered, chosen = facts.get("available_metrics", ()), request.get("role_metrics")
    try:
        found: dict[str, str] = SCORERS[DECOUPLED].load().decide(inventory.layers, offered, chosen)
    except PatternError as error:
        raise Unprocessable("unknown-layer", str(error), pointer="/role_metrics") from None
    for layer, metric in found.items():
        if metric not in offered:
            raise Unprocessable(
                "metric-not-offered",
                f"A metric of a role must suit the task and the data: {', '.join(sorted(offered))}. "
                f"Got {metric!r} for {layer}. Pick another one.",
                pointer="/role_metrics",
            )
    return found


def with_roles(request: Mapping[str, Any], inventory: Inventory) -> Inventory:
    """The inventory with the roles that the request gives. Raises Unprocessable."""
    try:
        return inventory.with_roles(request.get("roles") or {})
    except PatternError as error:
        raise Unprocessable("unknown-layer", str(error), pointer="/roles") from None


def context_names(facts: Mapping[str, Any]) -> list[str]:
    """The classes that the calibration data name, for a job's summary."""
    return list(facts["context_names"]) if "context_names" in facts else list(classes_of(facts))


def _contexts(wanted: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The contexts of a request; each must have samples in every part, where `facts` tell."""
    if not wanted:
        return ()
    edges = wanted.get("edges", ())
    names = timestep_ranges(edges) if edges else tuple(context_names(facts))
    if not names:
        raise _no_context("contexts need calibration data that name one for each sample. Got none.")
    if "context_names" in facts:
        return names
    for part in PARTS:
        classes, steps = ((facts.get(name) or {}).get(part) for name in ("contexts", "timesteps"))
        for name in names:
            try:
                count = int(members(name, classes, steps).sum())
            except ValueError as error:
                raise _no_context(str(error)) from None
            if count < LEAST_SAMPLES:
                raise _no_context(
                    f"Every context must hold at least {LEAST_SAMPLES} samples of every part. Got {count} in "
                    f"{name!r} of the {part} part. Send more data, or ask for fewer contexts."
                )
    return names


def _no_context(detail: str) -> Unprocessable:
    return Unprocessable("unknown-context", detail, pointer="/contexts")


def _over_contexts(rows: Sequence[ScoreRow], deciding: Deciding) -> list[ScoreRow]:
    """One row for all contexts where each has one: the weighted mean, or the worst."""
    groups: dict[tuple[str, str, str], dict[str, ScoreRow]] = {}
    for row in rows:
        if (context := context_of(row.metric)) in deciding.contexts:
            groups.setdefault((row.layer, row.scheme, without_context(row.metric)), {})[str(context)] = row
    whole = {key: found for key, found in groups.items() if len(found) == len(deciding.contexts)}
    pick = _worst if deciding.plans == MAXIMUM else _weighted
    return [_renamed(pick(metric, found, deciding), metric) for (_, _, metric), found in whole.items()]


def _worst(metric: str, found: Mapping[str, ScoreRow], _: Deciding) -> ScoreRow:
    worst = max if SCORERS[metric].direction == "min" else min
    return worst(found.values(), key=lambda row: row.value)


def _weighted(metric: str, found: Mapping[str, ScoreRow], deciding: Deciding) -> ScoreRow:
    """Contexts have different samples, so their errors are independent."""
    parts = [(deciding.weight(name), row) for name, row in found.items()]
    first = parts[0][1]
    errors = [None if row.stderr is None else weight * row.stderr for weight, row in parts]
    known = [error for error in errors if error is not None]
    return ScoreRow(
        first.layer,
        first.scheme,
        metric,
        math.fsum(weight * row.value for weight, row in parts),
        math.hypot(*known) if len(known) == len(errors) else None,
        sum(row.samples for _, row in parts),
    )


def _renamed(row: ScoreRow, metric: str) -> ScoreRow:
    return ScoreRow(row.layer, row.scheme, metric, row.value, row.stderr, row.samples)
