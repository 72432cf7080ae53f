"""From stored scores to plans: what the API's re-solve, the runner and the command share. No torch, no
database.

inputs = PlanningInputs(inventory, score_table(...), digests)      once per job
answer = solve_budget(inputs, Ask("3.5 bpw"))                      milliseconds per budget
answer.plan, answer.result                                         what is stored and shown
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quant.plan import Plan
from search.budget import parse_limits
from search.frontier import between, frontier
from search.objectives.catalog import DEFAULT, parse_objective, solve_objective
from search.objectives.worst import Worst
from search.problem import Solution
from service.explaining import frontier_json, stretch_json, totals_between
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.planning.question import compile_ask, compile_limits
from service.planning.result import plan_of, plan_result

STRETCH_SECONDS = 10.0
"""Of exact solves between two totals of a frontier."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a budget came to: `plan` is None when nothing fits or nothing was found in time."""

    solution: Solution
    plan: Plan | None
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        """optimal, feasible, infeasible or unknown."""
        return str(self.solution.status)


def settled_ask(inputs: PlanningInputs, ask: Ask) -> Ask:
    """The question with what its objective means: the worst context's sum, where the worst context decides
    and nothing else is asked for.
    """
    metric = ask.metric or next(iter(inputs.table.metrics))
    compared = () if inputs.deciding is None else inputs.deciding.compared(metric)
    if ask.objective != DEFAULT or not compared or not inputs.table.metrics.keys() >= set(compared):
        return ask
    return replace(ask, objective=Worst(compared).text)


def solve_budget(inputs: PlanningInputs, ask: Ask, *, solver: str = "auto") -> Answer:
    """The plan of one budget that is best for the objective, with its certificate; infeasible is an answer,
    not an error.

    Raises what `compile_ask` raises, and ObjectiveError.
    """
    ask = settled_ask(inputs, ask)
    compiled = compile_ask(inputs, ask)
    found = solve_objective(
        compiled,
        parse_objective(ask.objective),
        solver=solver,
        gap=ask.gap,
        time_limit=ask.time_limit_seconds,
        prices=True,
    )
    solution, plan = found.solution, None
    if solution.choice is not None:
        plan = plan_of(inputs, ask, compiled, compiled.assignment(solution.choice), solution=solution)
    return Answer(solution, plan, plan_result(inputs, ask, compiled, solution, plan, parts=found.parts))


def frontier_of(
    inputs: PlanningInputs, ask: Ask, resource: str, most: int, stretch: Sequence[str] | None = None
) -> dict[str, Any]:
    """The supported Pareto-optimal plans over a resource, the smallest first, as JSON with their exact
    resources; all such plans between two totals with `stretch`, which names them.

    The limits of `ask` hold, its budget does not. Raises what `compile_limits` raises.
    """
    compiled = compile_limits(inputs, ask, parse_limits(ask.limits))
    if stretch is None:
        return frontier_json(compiled, frontier(compiled, resource, most=most))
    low, high = totals_between(resource, stretch)
    return stretch_json(compiled, between(compiled, resource, low, high, most=most, seconds=STRETCH_SECONDS))
