"""Plan documents, and what a plan resource tells beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from quant.digest import digest
from quant.kv_cache import cache_type_of, split, weight_schemes
from quant.lint import rules_below
from quant.plan import Certificate, Plan
from quant.planning import build_plan
from quant.runtimes import RUNTIMES
from search.compile import Compiled, exact_number
from search.conflict import conflict_of
from search.objectives.catalog import DEFAULT
from search.objectives.objective import Part
from search.problem import Solution, Status
from search.rate_distortion import rate_distortion
from sensitivity.catalog import DECOUPLED
from sensitivity.contexts import without_context
from service.explaining import conflict_json, reference_json
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.planning.question import question_of
from service.planning.selection import pins_of

MOST_RULES = 4
"""Rules that an infeasible answer shows."""


def reason_of(inputs: PlanningInputs, ask: Ask, solution: Solution) -> str:
    """Why nothing fits, with the runtime's rules that forbid smaller schemes; "" where a plan was found."""
    if solution.status is not Status.INFEASIBLE or ask.runtime is None:
        return solution.reason
    pinned = pins_of(inputs, ask)
    layers = [layer for layer in inputs.inventory.layers if layer.name not in pinned]
    rules = rules_below(layers, weight_schemes(inputs.menu), RUNTIMES[ask.runtime])
    if not rules:
        return solution.reason
    most = sorted(rules.items(), key=lambda item: -len(item[1]))
    shown = "; ".join(f"{rule} ({_counted(names)})" for rule, names in most[:MOST_RULES])
    more = f"; and {len(most) - MOST_RULES} more rules" if len(most) > MOST_RULES else ""
    return f"{solution.reason}; {ask.runtime} forbids smaller schemes of the menu: {shown}{more}"


def _counted(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more layers"


def plan_of(
    inputs: PlanningInputs,
    ask: Ask,
    compiled: Compiled,
    assignment: Mapping[str, str],
    *,
    solution: Solution,
    source: str | None = None,
    predicted: float | None = None,
) -> Plan:
    """The plan document of an assignment; `solution` is the certificate that goes with it.

    `source` says how the plan was found (default: what `solved_for` says), `predicted` what the score model
    expects (default: the metric's sum).
    """
    settings, cheap = ask.settings_digest(inputs.menu), inputs.calibrated.get(compiled.metric)
    if cheap is not None:
        settings = digest({"settings": settings, "metric": compiled.metric, "calibrated_from": cheap})
    digests = replace(inputs.digests, settings=settings)
    weights, caches = split(assignment.items())
    return build_plan(
        inputs.inventory,
        dict(weights),
        digests=digests,
        budget=ask.text,
        metric=compiled.metric,
        predicted=compiled.objective(assignment) if predicted is None else predicted,
        certificate=certificate_of(solution),
        source=source or solved_for(ask, compiled.metric),
        runtime=ask.runtime,
        latency=inputs.sources.get("latency", {}).get("source"),
        calibration=inputs.calibration,
        corrections=inputs.corrections,
        decided_by=inputs.deciding.decided if inputs.deciding and is_decoupled(compiled.metric) else None,
        kv_cache={name: cache_type_of(scheme) for name, scheme in caches.items()},
        objective=None if ask.objective == DEFAULT else ask.objective,
    )


def plan_result(
    inputs: PlanningInputs,
    ask: Ask,
    compiled: Compiled,
    solution: Solution,
    plan: Plan | None,
    candidates: Sequence[Mapping[str, Any]] = (),
    parts: Sequence[Part] = (),
) -> dict[str, Any]:
    """The members of a plan resource that the document does not hold, as JSON."""
    used = {} if plan is None else compiled.resources(plan.assignment)
    return {
        "metric": compiled.metric,
        "objective": _finite(solution.objective),
        "bound": _finite(solution.bound),
        "gap": _finite(solution.gap),
        "source": None if plan is None else plan.source,
        "parts": [part.as_json() for part in parts],
        "candidates": [dict(candidate) for candidate in candidates],
        "shadow_prices": dict(solution.prices),
        "least_budget": numbers(solution.least_budget),
        "conflict": _conflict(inputs, ask, solution),
        "reference": None if plan is None else _reference(compiled, plan),
        "reason": reason_of(inputs, ask, solution),
        "resources": numbers(used),
        "score_sources": None if plan is None else score_sources(compiled, plan.assignment),
        "cost_sources": {name: dict(source) for name, source in inputs.sources.items()},
        "solver": solution.solver,
        "method": solution.method,
        "why": solution.why,
        "seconds": solution.seconds,
        "ask": ask.as_request(compiled.metric),
        "model": None if inputs.origin is None else dict(inputs.origin),
    }


def _reference(compiled: Compiled, plan: Plan) -> dict[str, Any] | None:
    return reference_json(rate_distortion(compiled.table, compiled.metric, plan.assignment))


def _conflict(inputs: PlanningInputs, ask: Ask, solution: Solution) -> dict[str, Any] | None:
    """Why nothing fits; None where something does."""
    if solution.status is not Status.INFEASIBLE:
        return None
    question = question_of(inputs, ask, ask.all_limits)
    return conflict_json(conflict_of(question, solution.least_budget))


def is_decoupled(metric: str) -> bool:
    """Whether a metric of a table is metric_decoupled, in some context or in all."""
    return without_context(metric) == DECOUPLED


def score_sources(compiled: Compiled, assignment: Mapping[str, str]) -> dict[str, Any] | None:
    """Where the score of each decision comes from, and how many of the choices were measured; None where all
    were.
    """
    table = compiled.table
    sources = table.metrics[compiled.metric].sources
    if sources is None:
        return None
    column = {name: i for i, name in enumerate(table.schemes)}
    offered = table.offered(compiled.metric)
    return {
        "measured": int((offered & (sources == compiled.metric)).sum()),
        "choices": int(offered.sum()),
        "layers": {
            name: str(sources[row, column[assignment[name]]]) for row, name in enumerate(table.layer_names)
        },
    }


def certificate_of(solution: Solution) -> Certificate:
    """What was proven; a plan is at least feasible."""
    status = Status.OPTIMAL if solution.status is Status.OPTIMAL else Status.FEASIBLE
    return Certificate(
        str(status), _finite(solution.objective), _finite(solution.bound), _finite(solution.gap)
    )


def solved_for(ask: Ask, metric: str) -> str:
    """The name of the program's own plan: by the objective where that is not the metric's sum."""
    return additive(metric) if ask.objective == DEFAULT else ask.objective


def additive(metric: str) -> str:
    """The name of the plan that minimizes the sum of one metric."""
    return f"additive {metric}"


def numbers(totals: Mapping[str, Fraction]) -> dict[str, int | float]:
    """Exact totals for JSON."""
    return {name: exact_number(Fraction(value)) for name, value in totals.items()}


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
