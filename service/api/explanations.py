"""Why a plan is as it is, or why nothing fits: computed from stored scores, without a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import Field

from quant.digest import canonical_json, digest
from quant.plan import parse_plan
from search.explain import DRAWS, explain
from search.solve import solve
from service.api.conditional import IfNoneMatch, matches, not_modified
from service.api.context import Ctx
from service.api.guarded import Guarded
from service.api.job_inputs import PLANNING_ERRORS, planning_inputs, planning_problem, search_job
from service.api.lookup import find_job, find_plan
from service.api.plans import PlanId
from service.api.resources import Json, Resource
from service.errors import Conflict
from service.explaining import explanation_json
from service.fields import LARGEST_SEED
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.planning.question import question_of
from service.records import PlanRecord

router = APIRouter(prefix="/v1/plans", tags=["plans"], route_class=Guarded)

SECONDS = 10.0
MOST_DRAWS = 1000

Draws = Annotated[
    int, Query(ge=0, le=MOST_DRAWS, description="Draws of the scores within their standard errors.")
]
Seed = Annotated[int, Query(ge=0, le=LARGEST_SEED, description="Seed of the draws.")]


class Change(Resource):
    """One step to the next larger or smaller scheme, everything else as it is."""

    scheme: str
    loss: float = Field(description="What it adds to the metric.")
    resources: Json = Field(description="What it adds to each resource, exact.")


class Decision(Resource):
    """One choice: a layer, or the layers that are tied."""

    layers: list[str]
    scheme: str
    objective: float = Field(description="Its part of the metric.")
    up: Change | None
    down: Change | None
    alternative: str | None = Field(description="The scheme that would win next at the shadow prices.")
    margin: float | None = Field(
        description="How much better the alternative's score would have to be for that; below 0 where the "
        "scheme only fills room."
    )
    stability: float | None = Field(description="Share of the draws that give the same scheme.")


class Relief(Resource):
    """A pin, tie, protection, forbidden choice or rule of a runtime, or all together, left out at the same
    limits.
    """

    kind: str
    name: str
    objective_without: float | None = Field(description="The optimum without it; null where time was up.")
    share: float | None = Field(description="The part of the optimum that it costs.")
    unscored: int = Field(description="Choices that it forbids and that have no score: it may cost more.")


class Explanation(Resource):
    """A plan explained; for one that does not fit, why."""

    plan: str
    status: str
    metric: str | None = None
    objective: float | None = Field(
        None, description="The plan's sum of the metric, whatever objective it was solved for."
    )
    optimum: float | None = Field(None, description="The best sum under what was asked.")
    shadow_prices: Json = Field({})
    excess: float | None = Field(
        None, description="Above the bound at the shadow prices; a larger margin is proven."
    )
    decisions: list[Decision] = Field([])
    restrictions: list[Relief] = Field([])
    reference: Json | None = None
    stability: Json | None = Field(None, description="How many draws, and how they were solved.")
    least_budget: Json = Field({})
    conflict: Json | None = None


@router.get(
    "/{plan_id}/explanation", response_model=Explanation, responses={304: {"description": "Unchanged."}}
)
def get_explanation(
    plan_id: PlanId, context: Ctx, draws: Draws = DRAWS, seed: Seed = 0, if_none_match: IfNoneMatch = None
) -> Response:
    """Per decision what a step would change, the margin to the next choice and how stable it is; what each
    pin, tie and rule costs; the Gaussian rate-distortion reference. It takes a few seconds at most.
    """
    with context.database.read() as session:
        plan = find_plan(context, session, plan_id)
        etag = f'"{digest([plan.id, plan.digest, plan.result, draws, seed])[:32]}"'
        if matches(etag, if_none_match):
            return not_modified(etag)
        try:
            ask, inputs = None, None
            if plan.document is not None:
                job = search_job(find_job(context, session, plan.job_id))
                asked = {**plan.result["ask"], "contexts": job.request.get("contexts")}
                ask = Ask.of(asked, asked["budgets"][0], plan.result["metric"])
                metrics = list(dict.fromkeys((str(ask.metric), *ask.named_metrics)))
                inputs = planning_inputs(context, session, job, metrics, ask.pins, ask.costs)
        except PLANNING_ERRORS as error:
            raise planning_problem(error) from None
    found = _refused(plan) if ask is None or inputs is None else _explained(plan, inputs, ask, draws, seed)
    body = Explanation.model_validate({"plan": plan.id, "status": plan.status, **found})
    return Response(
        canonical_json(body.model_dump(mode="json")), headers={"ETag": etag}, media_type="application/json"
    )


def _explained(
    plan: PlanRecord, inputs: PlanningInputs, ask: Ask, draws: int, seed: int
) -> Mapping[str, Any]:
    assert plan.document is not None, "what does not fit is told by _refused"
    assignment = parse_plan(canonical_json(plan.document)).assignment
    try:
        question = question_of(inputs, ask, ask.all_limits)
        limit = min(SECONDS, ask.time_limit_seconds)
        solution = solve(question.compiled().problem, gap=ask.gap, time_limit=limit, prices=True)
        if solution.choice is None:
            raise Conflict(
                "not-explained-in-time",
                f"A plan must be solved again within {limit:g} s to be explained. Got no plan. Ask again.",
                headers={"Retry-After": "10"},
            )
        found = explain(question, solution, assignment, draws=draws, seed=seed, seconds=SECONDS)
    except PLANNING_ERRORS as error:
        raise planning_problem(error) from None
    return explanation_json(found)


def _refused(plan: PlanRecord) -> Mapping[str, Any]:
    return {
        "metric": plan.result.get("metric"),
        "least_budget": plan.result.get("least_budget") or {},
        "conflict": plan.result.get("conflict"),
    }
