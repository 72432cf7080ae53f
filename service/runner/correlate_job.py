"""The handler of correlations: measure sampled plans, and say how well each stored metric ranks them.

Plans are measured on the choosing part, which did not score them, unit by unit: a job that died goes on where
it stopped, and what searches have measured is not measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.compile import Assignment, Compiled
from search.problem import Solution
from search.random_plans import near_plans, random_plans
from search.refine import Measured
from search.solve import solve
from sensitivity.catalog import DECOUPLED, INTERACTIONS
from sensitivity.evidence import mean_interval
from sensitivity.ranks import as_json as coefficients
from sensitivity.ranks import rank_correlation, split_half
from service.planning.ask import Ask
from service.planning.question import compile_ask
from service.planning.result import numbers
from service.runner.context import JobContext
from service.runner.lab import Lab, Part, inventory_of
from service.runner.predictors import Predictor, predictors
from service.runner.rivals import Factor, candidates
from service.runner.search_job import (
    Search,
    asks_of,
    caches_in,
    factor_of_metric,
    offered_choices,
    open_lab,
    scored,
)
from service.runner.settling import settle
from service.runner.soundness import Soundness, soundness, together
from service.states import Stage
from service.wire import CorrelationJob, JobRequest

PART: Part = "choosing"
ALL = "all"
SAMPLED = ("random", "near")
SOLVER = "solver"


@dataclass(frozen=True)
class Sample:
    """A plan to measure: `kind` is random, near or solver, `source` what a solver's plan minimizes."""

    kind: str
    source: str
    assignment: Assignment


@dataclass(frozen=True)
class Sampled:
    """The plans of one budget; none where nothing fits."""

    ask: Ask
    compiled: Compiled
    solution: Solution
    plans: tuple[Sample, ...]


def run_correlations(context: JobContext) -> Mapping[str, Any]:
    """Score what is missing, measure plans at every budget, correlate; the summary is the whole answer."""
    asked = CorrelationJob.model_validate(dict(context.job.request))
    with open_lab(context, asked.search) as lab:
        request = _with_stored(context, lab, asked.search) if asked.every_stored else asked.search
        search = scored(context, lab, request)
        asks = asks_of(search.request)
        judged = predictors(search.inputs, asks[0], _factors(lab, search))
        scores = _scores(lab, search, judged)
        budgets = [sampled_plans(search, ask, asked.plans) for ask in asks]
        plans = [plan.assignment for budget in budgets for plan in budget.plans]
        measured = iter(lab.measure(plans, PART, Stage.MEASURING))
        answers = [
            answer_of(budget, judged, [next(measured) for _ in budget.plans], request.seed)
            for budget in budgets
        ]
    return {
        "job": asked.job,
        "part": PART,
        "samples": int(search.inspection["samples"][PART]),
        "divergence": search.inspection["divergence"],
        "notes": lab.notes(search.inputs.inventory.by_name, search.inputs.table.metrics),
        "scores": scores,
        "budgets": answers,
    }


def _with_stored(context: JobContext, lab: Lab, request: JobRequest) -> JobRequest:
    """The request with the metrics it means, and every other one that is stored for all its choices."""
    inspection = lab.inspect()
    request, _ = settle(context, lab.score_set, request, inspection)
    choices = offered_choices(inventory_of(inspection), request, caches_in(request, inspection))
    known = {*request.metrics, request.refine_metric, DECOUPLED}
    added = [name for name in lab.complete(choices) if name in inspection["available_metrics"]]
    metrics = [*request.metrics, *(name for name in added if name not in known)]
    return request.model_copy(update={"metrics": metrics})


def _factors(lab: Lab, search: Search) -> dict[str, Factor]:
    """The interactions of every metric that has some."""
    samples = int(search.inspection["samples"]["scoring"])
    named = [name for name in INTERACTIONS if name in search.inputs.table.metrics]
    return {name: factor_of_metric(lab, search.inputs, search.choices, samples, name) for name in named}


def _scores(lab: Lab, search: Search, judged: Sequence[Predictor]) -> list[dict[str, Any]]:
    """What each score model is made of and cost; a metric's own soundness."""
    found = soundness(lab, search.choices, list(search.inputs.table.metrics), search.request.seed)
    rows = []
    for one in judged:
        own = found[one.name] if one.name in found else Soundness(together(found, one.metrics), None, None)
        about = {"name": one.name, "metrics": list(one.metrics), "weight": one.weight}
        rows.append(about | own.as_json())
    return rows


def sampled_plans(search: Search, ask: Ask, count: int) -> Sampled:
    """Solvers' plans, `count` random ones and `count` near the optimum of the first metric."""
    compiled = compile_ask(search.inputs, ask)
    problem, seed = compiled.problem, search.request.seed
    solution = solve(problem, gap=ask.gap, time_limit=ask.time_limit_seconds)
    if solution.choice is None:
        return Sampled(ask, compiled, solution, ())
    found = candidates(search.inputs, ask, compiled, solution, search.factor)
    drawn = {
        "random": random_plans(problem, count, seed=seed),
        "near": near_plans(problem, solution.choice, count, seed=seed),
    }
    plans = [Sample(SOLVER, one.source, dict(one.assignment)) for one in found]
    plans += [Sample(kind, "", compiled.assignment(plan)) for kind in drawn for plan in drawn[kind]]
    return Sampled(ask, compiled, solution, tuple(plans))


def answer_of(
    sampled: Sampled, judged: Sequence[Predictor], measured: Sequence[Measured], seed: int
) -> dict[str, Any]:
    """What one budget came to."""
    pairs = list(zip(sampled.plans, measured, strict=True))
    kinds = {kind: [pair for pair in pairs if pair[0].kind == kind] for kind in SAMPLED} if pairs else {}
    if pairs:
        kinds[ALL] = list({tuple(pair[0].assignment.items()): pair for pair in pairs}.values())
    return {
        "budget": sampled.ask.budget,
        "status": str(sampled.solution.status),
        "least_budget": numbers(sampled.solution.least_budget),
        "plans": {kind: _spread(chosen) for kind, chosen in kinds.items()},
        "correlations": [row for kind in kinds for row in _correlations(judged, kind, kinds[kind], seed)],
        "solver_plans": [_solver_plan(sampled.compiled, *pair) for pair in pairs if pair[0].kind == SOLVER],
    }


def _spread(chosen: Sequence[tuple[Sample, Measured]]) -> dict[str, Any]:
    """How many plans, how far apart they lie, and how reliably these samples rank them at all."""
    means = [measured.mean for _, measured in chosen]
    draws = np.stack([measured.per_sample for _, measured in chosen], axis=1) if chosen else np.zeros((0, 0))
    return {
        "count": len(chosen),
        "least": min(means, default=None),
        "most": max(means, default=None),
        "reliability": split_half(draws),
    }


def _correlations(
    judged: Sequence[Predictor], kind: str, chosen: Sequence[tuple[Sample, Measured]], seed: int
) -> list[dict[str, Any]]:
    means = [measured.mean for _, measured in chosen]
    rows = []
    for one in judged:
        predicted = [one.value(sample.assignment) for sample, _ in chosen]
        found = rank_correlation(predicted, means, seed=seed)
        rows.append({"score": one.name, "plans": kind, **coefficients(found)})
    return rows


def _solver_plan(compiled: Compiled, sample: Sample, measured: Measured) -> dict[str, Any]:
    bits = float(compiled.resources(sample.assignment)["bits_per_weight"])
    divergence = mean_interval(measured.per_sample).as_json()
    return {"source": sample.source, "bits_per_weight": bits, "divergence": divergence}
