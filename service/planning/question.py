"""From what is asked to the problem that is solved, in parts that can be left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quant.kv_cache import weight_schemes
from quant.lint import (
    forbidden_caches,
    forbidding_rules,
)
from quant.runtimes import RUNTIMES
from search.budget import Limit
from search.compile import Compiled, CompileError
from search.objectives.catalog import parse_objective
from search.objectives.quadratic import Quadratic
from search.question import Question, Restriction
from service.planning.ask import Ask, limited_metrics
from service.planning.inputs import PlanningInputs, ScoresMissing
from service.planning.selection import (
    expand_forbidden,
    expand_pins,
    expand_ties,
    missing_scores,
    pins_of,
    protected,
    require_runtime,
    scoped_limits,
)


def compile_ask(inputs: PlanningInputs, ask: Ask) -> Compiled:
    """The problem of one budget. Raises what `compile_limits` raises, and BudgetError."""
    return compile_limits(inputs, ask, ask.all_limits)


def compile_limits(inputs: PlanningInputs, ask: Ask, limits: Sequence[Limit]) -> Compiled:
    """The problem under `limits` with the pins, ties and metric of `ask`.

    Raises PatternError, CompileError or BudgetError for what the request names and the table lacks,
    RuntimeRefuses when the runtime leaves a layer without a choice, ScoresMissing when a choice has no score.
    """
    return question_of(inputs, ask, limits).compiled()


def question_of(inputs: PlanningInputs, ask: Ask, limits: Sequence[Limit]) -> Question:
    """The same in parts that can be left out: `limits`, and each protection, pin, tie, forbidden choice and
    rule by itself.

    Raises what `compile_limits` raises, but for limits on what the table lacks.
    """
    if ask.runtime is not None:
        require_runtime(inputs, pins_of(inputs, ask), RUNTIMES[ask.runtime])
    metric = ask.metric or next(iter(inputs.table.metrics))
    objective = parse_objective(ask.objective)
    for name in dict.fromkeys((metric, *objective.metrics, *limited_metrics(limits))):
        _require_scores(inputs, ask, name)
    if isinstance(objective, Quadratic) and inputs.unpaired is not None:
        _require(inputs, ask, "interactions", inputs.unpaired)
    return Question(
        inputs.table,
        metric,
        (*limits, *scoped_limits(inputs.inventory, ask)),
        (
            *_protections(inputs, ask),
            *_pins(inputs, ask, metric),
            *_ties(inputs, ask),
            *_forbidden(inputs, ask, metric),
            *_rules(inputs, ask, metric),
        ),
        inputs.menu,
    )


def _require_scores(inputs: PlanningInputs, ask: Ask, metric: str) -> None:
    if metric in inputs.table.metrics:
        _require(inputs, ask, f"a score in {metric}", np.isnan(inputs.table.metrics[metric].values))


def _require(inputs: PlanningInputs, ask: Ask, what: str, unknown: NDArray[np.bool_]) -> None:
    gaps = missing_scores(inputs, ask, unknown)
    if gaps:
        shown = ", ".join(f"{layer} x {scheme}" for layer, scheme in gaps[:3])
        raise ScoresMissing(
            f"Every layer and scheme of the menu must have {what}. Got none for {shown} ({len(gaps)} in all)."
            " Wait for the job to end; a scheme off its menu, or one that it forbids, needs a new job."
        )


def _protections(inputs: PlanningInputs, ask: Ask) -> Iterator[Restriction]:
    for pattern in ask.protect:
        pins = protected(inputs, replace(ask, protect=(pattern,)))
        yield Restriction("protect", f"protected {pattern}", pins=pins)


def _pins(inputs: PlanningInputs, ask: Ask, metric: str) -> Iterator[Restriction]:
    """Patterns first: of two pins of a layer the later one wins."""
    names = {*inputs.inventory.by_name, *inputs.cache_layers}
    for pattern, scheme in sorted(ask.pins.items(), key=lambda pin: pin[0] in names):
        pins = expand_pins(inputs.inventory, {pattern: scheme}, inputs.cache_layers)
        unscored = _unscored(inputs, metric, dict.fromkeys(pins, inputs.menu))
        yield Restriction("pin", f"{pattern}={scheme}", pins=pins, unscored=unscored)


def _ties(inputs: PlanningInputs, ask: Ask) -> Iterator[Restriction]:
    for tie in ask.ties:
        sets = expand_ties(inputs.inventory, [tie], inputs.cache_layers)
        if ties := tuple(members for members in sets if len(members) > 1):
            yield Restriction("tie", "+".join(tie), ties=ties)


def _forbidden(inputs: PlanningInputs, ask: Ask, metric: str) -> Iterator[Restriction]:
    """Raises CompileError for a scheme that no layer could get anyhow."""
    for pattern, schemes in ask.forbid.items():
        own = expand_forbidden(inputs.inventory, {pattern: schemes}, inputs.cache_layers)
        unknown = [name for names in own.values() for name in names if name not in inputs.table.schemes]
        if unknown:
            raise CompileError(
                f"A forbidden scheme must be one of the menu: {', '.join(inputs.table.schemes)}."
                f" Got {unknown[0]!r} for {pattern!r:.80}. Leave it out."
            )
        name, unscored = f"{pattern}={','.join(schemes)}", _unscored(inputs, metric, own)
        yield Restriction("forbid", name, forbidden=own, unscored=unscored)


def _rules(inputs: PlanningInputs, ask: Ask, metric: str) -> Iterator[Restriction]:
    """What the runtime stores as one, its one type for caches, and each rule that forbids schemes."""
    if ask.runtime is None:
        return
    runtime, layers, caches = RUNTIMES[ask.runtime], inputs.inventory.layers, inputs.caches
    for fused in runtime.fused:
        if sets := fused.sets(inputs.table.layer_names):
            yield Restriction("rule", f"{ask.runtime} fuses {', '.join(fused.members)}", ties=sets)
    if caches is not None and runtime.one_cache and len(caches.layers) > 1:
        yield Restriction("rule", f"{ask.runtime} has one type for all caches", ties=(caches.layers,))
    rules: dict[str, Mapping[str, Sequence[str]]] = dict(
        forbidding_rules(layers, weight_schemes(inputs.table.schemes), runtime)
    )
    if caches is not None and (refused := forbidden_caches(caches, runtime)):
        rules[f"caches are {', '.join(runtime.kv_cache)}"] = refused
    for rule, forbidden in rules.items():
        unscored = _unscored(inputs, metric, forbidden)
        yield Restriction("rule", f"{ask.runtime}: {rule}", forbidden=forbidden, unscored=unscored)


def _unscored(inputs: PlanningInputs, metric: str, cells: Mapping[str, Sequence[str]]) -> int:
    """How many of some choices of the menu have no score."""
    table = inputs.table
    if metric not in table.metrics:
        return 0
    gaps = table.resources_offered() & np.isnan(table.metrics[metric].values)
    return sum(
        bool(gaps[row, column])
        for row, layer in enumerate(table.layer_names)
        for column, scheme in enumerate(table.schemes)
        if scheme in cells.get(layer, ()) and scheme in inputs.menu
    )
