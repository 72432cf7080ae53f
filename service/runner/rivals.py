"""The plans that stand beside the additive optimum: quadratic ones, other metrics' ones, uniform ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from search.compile import Assignment, Compiled
from search.pairwise import PairwiseModel, pairwise_model
from search.problem import Choice, Solution
from search.refine import Candidate
from search.solve import solve
from search.solvers.quadratic import solve_quadratic
from sensitivity.catalog import SCORERS
from service.planning import Ask, PlanningInputs, additive, compile_ask, expand_pins

MIXTURES = (0.25, 0.5, 1.0)
SCREEN = 0.5
"""Weights of the interactions in the candidates, and in the model that proposes measured moves."""

Factor = NDArray[np.float64]


def uniform_assignments(inputs: PlanningInputs, pins: Mapping[str, str]) -> dict[str, Assignment]:
    """ "uniform SCHEME" -> every layer at that scheme, pinned layers at theirs; only what every layer
    offers.
    """
    table, pinned = inputs.table, expand_pins(inputs.inventory, pins)
    offered = table.resources_offered()
    found = {}
    for column, scheme in enumerate(table.schemes):
        if scheme in inputs.menu and offered[:, column].all():
            found[f"uniform {scheme}"] = {name: pinned.get(name, scheme) for name in table.layer_names}
    return found


def fits(compiled: Compiled, assignment: Assignment) -> bool:
    """Whether a plan keeps every limit, tie and pin of the problem."""
    try:
        choice = compiled.choice(assignment)
    except ValueError:
        return False
    return compiled.problem.feasible(choice)


def candidates(
    inputs: PlanningInputs, ask: Ask, compiled: Compiled, solution: Solution, factor: Factor | None
) -> list[Candidate]:
    """Every plan worth measuring before the local search, the additive optimum first."""
    assert solution.choice is not None
    found = [Candidate(additive(compiled.metric), compiled.assignment(solution.choice))]
    found += _other_metrics(inputs, ask, compiled)
    if factor is not None:
        found += _quadratic(inputs, ask, compiled, solution.choice, factor)
    uniforms = uniform_assignments(inputs, ask.pins)
    return found + [Candidate(name, plan) for name, plan in uniforms.items() if fits(compiled, plan)]


def screen(
    inputs: PlanningInputs, ask: Ask, compiled: Compiled, factor: Factor | None
) -> PairwiseModel | None:
    """The model that proposes moves to the local search; None means the additive one."""
    base = _quadratic_base(inputs, ask, compiled)
    return None if factor is None or base is None else pairwise_model(base, factor, SCREEN)


def _other_metrics(inputs: PlanningInputs, ask: Ask, compiled: Compiled) -> list[Candidate]:
    found = []
    for metric in inputs.table.metrics:
        if metric != compiled.metric and SCORERS[metric].additive:
            other = _compiled_for(inputs, ask, metric)
            solution = solve(other.problem, gap=ask.gap, time_limit=ask.time_limit_seconds)
            if solution.choice is not None:
                found.append(Candidate(additive(metric), other.assignment(solution.choice)))
    return found


def _quadratic(
    inputs: PlanningInputs, ask: Ask, compiled: Compiled, start: Choice, factor: Factor
) -> list[Candidate]:
    base = _quadratic_base(inputs, ask, compiled)
    if base is None:
        return []
    found = []
    for weight in MIXTURES:
        model = pairwise_model(base, factor, weight)
        answer = solve_quadratic(base.problem, model, [start], time_limit=ask.time_limit_seconds)
        found.append(Candidate(f"quadratic {weight:g}", base.assignment(answer.choice)))
    return found


def _quadratic_base(inputs: PlanningInputs, ask: Ask, compiled: Compiled) -> Compiled | None:
    """The problem whose costs are in the unit of the interactions: those of output_kl, else their own
    diagonal.
    """
    units: Sequence[str] = [
        name for name in ("output_kl", "gram_output", "gram_fisher") if name in inputs.table.metrics
    ]
    if not units:
        return None
    return compiled if compiled.metric == units[0] else _compiled_for(inputs, ask, units[0])


def _compiled_for(inputs: PlanningInputs, ask: Ask, metric: str) -> Compiled:
    return compile_ask(inputs, replace(ask, metric=metric))
