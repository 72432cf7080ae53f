"""One budget of a search: solve it, refine the plan by measurements, and store it with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant.digest import digest
from quant.plan import Plan
from search.choosers import CHOOSERS
from search.compile import Assignment, Compiled
from search.objectives.catalog import parse_objective, solve_objective
from search.objectives.objective import Objective, ObjectiveError, Optimum, Part
from search.problem import Solution
from search.refine import CORRECTED, LOCAL, Refined
from service import metrics
from service.db.repositories import plans
from service.errors import Unprocessable
from service.failpoints import failpoint
from service.planning.answer import settled_ask
from service.planning.ask import Ask
from service.planning.question import compile_ask
from service.planning.result import numbers, plan_of, plan_result
from service.runner.context import JobContext
from service.runner.evidence import measured_evidence
from service.runner.lab import Lab
from service.runner.losses import Losses
from service.runner.rivals import candidates, fits, rivals, screen

if TYPE_CHECKING:
    from service.runner.search_job import Search

Evidence = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Solved:
    """The answer to one question: its problem, the program's solution with the `parts` of its objective, and
    what measuring made of it.
    """

    ask: Ask
    compiled: Compiled
    solution: Solution
    refined: Refined | None
    parts: tuple[Part, ...] = ()


def losses_of(lab: Lab, search: Search, metric: str) -> Losses:
    """What plans of a problem that `metric` decides are compared by."""
    return Losses(lab, metric, search.deciding, search.deciding.chosen(search.inspection, "choosing"))


def solved(context: JobContext, lab: Lab, search: Search, ask: Ask) -> Solved:
    """Solve one question and refine what the program found."""
    ask = settled_ask(search.inputs, ask)
    objective = parse_objective(ask.objective)
    compiled = objective.constrained(compile_ask(search.inputs, ask))
    context.check()
    found = _optimum(compiled, objective, ask)
    solution = found.solution
    if solution.choice is None:
        return Solved(ask, compiled, solution, None, found.parts)
    named = candidates(search.inputs, ask, compiled, solution, search.factor, search.request.ratios)
    considered = [*named, *rivals(search.inputs, ask, compiled)]
    refined = CHOOSERS[search.request.chooser].choose(
        compiled,
        [candidate for candidate in considered if fits(compiled, dict(candidate.assignment))],
        losses_of(lab, search, compiled.metric),
        predicted=screen(search.inputs, ask, compiled, search.factor),
        evaluations=search.request.evaluations,
        seed=search.request.seed,
    )
    return Solved(ask, compiled, solution, refined, found.parts)


def _optimum(compiled: Compiled, objective: Objective, ask: Ask) -> Optimum:
    """The objective's own plan. Raises Unprocessable where its metrics do not have what it needs."""
    try:
        with metrics.timed(metrics.SOLVE_SECONDS):
            return solve_objective(
                compiled, objective, gap=ask.gap, time_limit=ask.time_limit_seconds, prices=True
            )
    except ObjectiveError as error:
        raise Unprocessable("invalid-objective", str(error), pointer="/objective") from error


def settings_of(search: Search, ask: Ask, kind: str) -> str:
    """Identifies everything but the budget that a stored plan depends on."""
    tries = [search.request.chooser, search.request.evaluations, *search.request.ratios]
    return digest([kind, ask.settings_digest(search.inputs.menu), *tries])


def plan_budget(context: JobContext, lab: Lab, search: Search, ask: Ask) -> str:
    """Solve, refine, prove and store the plan of one budget; its status."""
    settings = settings_of(search, ask, "search")
    with context.database.read() as session:
        known = plans.find(session, context.job.id, ask.budget, settings)
    if known is not None:
        return known.status
    found = solved(context, lab, search, ask)
    refined = found.refined
    if refined is None:
        return store(context, search, found, ask.budget, settings, None, None)
    plan, evidence = proven(lab, search, found, refined.assignment, refined.source)
    return store(context, search, found, ask.budget, settings, plan, evidence)


def proven(
    lab: Lab, search: Search, found: Solved, assignment: Assignment, source: str
) -> tuple[Plan, Evidence]:
    """The plan document of a measured answer, and its evidence."""
    inputs, ask, compiled = search.inputs, found.ask, found.compiled
    plan = plan_of(inputs, ask, compiled, assignment, solution=found.solution, source=source)
    losses = losses_of(lab, search, compiled.metric)
    return plan, measured_evidence(lab, inputs, ask, assignment, search.inspection, losses)


def store(
    context: JobContext,
    search: Search,
    found: Solved,
    budget: str,
    settings: str,
    plan: Plan | None,
    evidence: Evidence | None,
    *,
    status: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> str:
    """Store the plan under what was asked for; `more` are members of its resource. Gives its status, the
    program's unless `status` says another.
    """
    said = status or str(found.solution.status)
    tried = () if found.refined is None else candidates_json(found.refined)
    result = plan_result(search.inputs, found.ask, found.compiled, found.solution, plan, tried, found.parts)
    failpoint("runner.writing_plan")
    context.write(
        lambda session: plans.insert(
            session,
            job_id=context.job.id,
            budget=budget,
            settings_digest=settings,
            status=said,
            digest=None if plan is None else plan.digest,
            document=None if plan is None else plan.as_json(),
            result=result | _pareto(found) | dict(more or {}),
            evidence=evidence,
            tenant=context.job.tenant,
        )
    )
    return said


def _pareto(found: Solved) -> dict[str, Any]:
    """The Pareto set of a search over several objectives, as a member of the plan resource."""
    if found.refined is None or not found.refined.pareto:
        return {}
    return {
        "pareto": [
            {
                "source": one.source,
                "objectives": dict(one.objectives),
                "measured": {"mean": one.measured.mean, "stderr": one.measured.stderr},
                "resources": numbers(found.compiled.resources(one.assignment)),
                "layers": dict(one.assignment),
            }
            for one in found.refined.pareto
        ]
    }


def candidates_json(refined: Refined) -> tuple[dict[str, Any], ...]:
    """What was measured on the choosing part, in order: the named candidates, then each accepted move."""
    return tuple(
        {
            "source": step.source,
            "predicted": step.predicted,
            "measured": {"mean": step.measured.mean, "stderr": step.measured.stderr},
            "accepted": step.accepted,
        }
        for step in refined.trace
        if step.accepted or step.source not in (CORRECTED, LOCAL)
    )
