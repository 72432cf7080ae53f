"""The plans that stand beside the additive optimum: quadratic ones, other metrics' ones, uniform ones, and
what people do without scores: the ends at more bits, and random plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from quant.kv_cache import FULL, cache_scheme, is_cache
from search.compile import Assignment, Compiled
from search.decoupled import RATIOS, sweep
from search.pairwise import PairwiseModel, pairwise_model
from search.problem import Choice, Problem, Solution
from search.random_plans import random_plans
from search.refine import Candidate
from search.solve import solve
from search.solvers.quadratic import solve_quadratic
from sensitivity.catalog import INTERACTIONS, SCORERS
from sensitivity.contexts import context_of, without_context
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.planning.question import compile_ask
from service.planning.result import additive, is_decoupled, solved_for
from service.planning.selection import forbidden_of, pins_of

MIXTURES = (0.25, 0.5, 1.0)
SCREEN = 0.5
"""Weights of the interactions in the candidates, and in the model that proposes measured plans before
measurements correct it.
"""
RANDOM = 6
"""Random plans that are measured beside a plan."""

Factor = NDArray[np.float64]


def uniform_assignments(inputs: PlanningInputs, ask: Ask) -> dict[str, Assignment]:
    """ "uniform SCHEME" -> every layer at that scheme, pinned and protected layers at theirs; only what all
    other layers offer and neither question nor runtime forbids there.

    Where caches are decided, they are full, or all of one type: "uniform w4 kv-int8"; each plan once.
    """
    table, pinned = inputs.table, pins_of(inputs, ask)
    weights = [layer.name for layer in inputs.inventory.layers]
    free = [row for row, name in enumerate(weights) if name not in pinned]
    offered = table.resources_offered()[free]
    columns = [(column, name) for column, name in enumerate(table.schemes) if not is_cache(name)]
    forbidden = forbidden_of(inputs, ask)
    refused = {name for layer, names in forbidden.items() if layer not in pinned for name in names}
    schemes = [name for column, name in columns if name in inputs.menu and offered[:, column].all()]
    schemes = [name for name in schemes if name not in refused]
    kinds = ("",) if inputs.caches is None else tuple(k for k in inputs.caches.menu if k not in refused)
    found: dict[str, Assignment] = {}
    for scheme, kind in product(schemes, kinds):
        own = dict.fromkeys(weights, scheme) | dict.fromkeys(inputs.cache_layers, kind) | pinned
        suffix = "" if kind in ("", cache_scheme(FULL)) else f" {kind}"
        if not suffix or own != found[f"uniform {scheme}"]:
            found[f"uniform {scheme}{suffix}"] = own
    return found


def fits(compiled: Compiled, assignment: Assignment) -> bool:
    """Whether a plan keeps every limit, tie and pin of the problem."""
    try:
        choice = compiled.choice(assignment)
    except ValueError:
        return False
    return compiled.problem.feasible(choice)


def candidates(
    inputs: PlanningInputs,
    ask: Ask,
    compiled: Compiled,
    solution: Solution,
    factor: Factor | None,
    ratios: Sequence[float] = RATIOS,
) -> list[Candidate]:
    """Every plan worth measuring before the local search, the program's own first; with metric_decoupled
    the plans of all `ratios` too.
    """
    assert solution.choice is not None
    found = [Candidate(solved_for(ask, compiled.metric), compiled.assignment(solution.choice))]
    if inputs.deciding is not None and is_decoupled(compiled.metric):
        decided = inputs.deciding.decided
        found += sweep(compiled, decided, lambda problem: _solved(problem, ask, len(ratios)), ratios)
    found += _other_metrics(inputs, ask, compiled)
    if factor is not None:
        found += _quadratic(inputs, ask, compiled, solution.choice, factor)
    uniforms = uniform_assignments(inputs, ask)
    return found + [Candidate(n, plan, rival=True) for n, plan in uniforms.items() if fits(compiled, plan)]


def rivals(inputs: PlanningInputs, ask: Ask, compiled: Compiled) -> list[Candidate]:
    """What a plan must be better than beside the uniform schemes: it is measured with the candidates."""
    return high_ends(inputs, ask, compiled) + random_rivals(compiled)


def random_rivals(compiled: Compiled) -> list[Candidate]:
    """Random plans that fill the budget, the same ones each time."""
    found = random_plans(compiled.problem, RANDOM)
    return [
        Candidate(f"random {number}", compiled.assignment(choice), rival=True)
        for number, choice in enumerate(found, 1)
    ]


def high_ends(inputs: PlanningInputs, ask: Ask, compiled: Compiled) -> list[Candidate]:
    """The first and the last layer at the scheme with the most bytes, the rest at the largest that then fits:
    no plan where nothing does. Layers tied to an end go with it, pins win.
    """
    uniforms = uniform_assignments(inputs, ask)
    sizes = {name: compiled.resources(plan)["bytes"] for name, plan in uniforms.items()}
    order = sorted(sizes, key=lambda name: -sizes[name])
    ends = _ends(inputs, ask, compiled)
    for high, low in ((high, low) for high in order for low in order if sizes[low] < sizes[high]):
        plan = uniforms[low] | {name: uniforms[high][name] for name in ends}
        if ends and fits(compiled, plan):
            names = (high.removeprefix("uniform "), low.removeprefix("uniform "))
            return [Candidate(f"ends {names[0]}, rest {names[1]}", plan, rival=True)]
    return []


def _ends(inputs: PlanningInputs, ask: Ask, compiled: Compiled) -> list[str]:
    """The first and the last free layer of the model, and what is tied to them."""
    pinned, names = pins_of(inputs, ask), compiled.table.layer_names
    free = [row for row, layer in enumerate(inputs.inventory.layers) if layer.name not in pinned]
    ends = {free[0], free[-1]} if free else set()
    return [names[row] for group in compiled.groups if ends & set(group) for row in group]


def _solved(problem: Problem, ask: Ask, shares: int) -> Solution:
    return solve(problem, gap=ask.gap, time_limit=ask.time_limit_seconds / shares)


def screen(
    inputs: PlanningInputs, ask: Ask, compiled: Compiled, factor: Factor | None
) -> PairwiseModel | None:
    """The model that proposes moves to the local search; None means the additive one."""
    base = _quadratic_base(inputs, ask, compiled)
    return None if factor is None or base is None else pairwise_model(base, factor, SCREEN)


def _other_metrics(inputs: PlanningInputs, ask: Ask, compiled: Compiled) -> list[Candidate]:
    found = []
    for metric in inputs.table.metrics:
        if _rivals(metric, compiled.metric):
            other = _compiled_for(inputs, ask, metric)
            solution = solve(other.problem, gap=ask.gap, time_limit=ask.time_limit_seconds)
            if solution.choice is not None:
                found.append(Candidate(additive(metric), other.assignment(solution.choice)))
    return found


def _rivals(metric: str, deciding: str) -> bool:
    """Whether another metric's plan is worth measuring: it adds up, and is not of another context."""
    other = context_of(metric) not in (None, context_of(deciding))
    return metric != deciding and not other and SCORERS[without_context(metric)].additive


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
    units: Sequence[str] = [name for name in ("output_kl", *INTERACTIONS) if name in inputs.table.metrics]
    if not units:
        return None
    return compiled if compiled.metric == units[0] else _compiled_for(inputs, ask, units[0])


def _compiled_for(inputs: PlanningInputs, ask: Ask, metric: str) -> Compiled:
    return compile_ask(inputs, replace(ask, metric=metric))
