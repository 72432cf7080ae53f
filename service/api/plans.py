"""Plans: list, solve again in milliseconds, download, measure."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from sqlalchemy.orm import Session

from quant.digest import canonical_json, digest
from search.objectives.catalog import parse_objective
from search.objectives.objective import ObjectiveError
from search.objectives.quadratic import Quadratic
from sensitivity.contexts import in_context
from service import metrics
from service.api.conditional import IfNoneMatch, matches, not_modified
from service.api.context import After, Context, Ctx, Limit
from service.api.guarded import Guarded
from service.api.idempotency import Answer, IdempotencyKey, once
from service.api.job_inputs import (
    PLANNING_ERRORS,
    planning_inputs,
    planning_problem,
    search_job,
    with_interactions,
)
from service.api.job_resources import Job, Plan, Plans
from service.api.jobs import JobId, accepted, queued_once
from service.api.lookup import find_job, find_plan
from service.api.pages import page_of, position
from service.api.resources import Page
from service.costing import cost_request, without_costs
from service.db.repositories import plans
from service.deciding import deciding_metric
from service.errors import Conflict, NotFound
from service.fields import objective_fault
from service.planning.answer import Answer as Solved
from service.planning.answer import solve_budget
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.records import JobRecord, PlanRecord
from service.states import JobKind
from service.wire import PlansRequest

router = APIRouter(prefix="/v1", tags=["plans"], route_class=Guarded)
PlanId = Annotated[str, Path(max_length=100)]
Question = tuple[Ask, str, Solved | None]


@router.get("/jobs/{job_id}/plans")
def list_plans(job_id: JobId, context: Ctx, limit: Limit = 50, cursor: After = None) -> Page[Plan]:
    """The plans of a job, the newest first: those of its budgets and those of later solves."""
    kind = f"plans of {job_id}"
    with context.database.read() as session:
        find_job(context, session, job_id)
        after = position(context.cursors, kind, cursor)
        rows = plans.list_page(session, job_id, limit=limit, after=after, tenant=context.tenant)
    return page_of(context.cursors, kind, rows, limit, Plan.of)


@router.post("/jobs/{job_id}/plans", status_code=201, response_model=Plans)
def solve_again(job_id: JobId, body: PlansRequest, context: Ctx, key: IdempotencyKey = None) -> Response:
    """Plan other budgets from the stored scores: no measurement, milliseconds. Infeasible is an answer.

    The same question gives the same plan, not a second one. Evidence comes on request, see /measure.
    """

    solved = _solve(context, job_id, body)

    def store(session: Session) -> Answer:
        find_job(context, session, job_id)
        rows = [_stored(context, session, job_id, item) for item in solved]
        return Answer(201, Plans(items=[Plan.of(row) for row in rows]))

    return once(context, key, f"POST /v1/jobs/{job_id}/plans", body.model_dump(mode="json"), store)


@router.get("/plans/{plan_id}")
def get_plan(plan_id: PlanId, context: Ctx, response: Response) -> Plan:
    """A plan with its certificate, its resources, its document and, once measured, its evidence."""
    with context.database.read() as session:
        plan = find_plan(context, session, plan_id)
    response.headers["ETag"] = f'"{digest([plan.digest, plan.result, plan.evidence])[:32]}"'
    return Plan.of(plan)


@router.get(
    "/plans/{plan_id}/document", response_class=Response, responses={304: {"description": "Unchanged."}}
)
def get_document(plan_id: PlanId, context: Ctx, if_none_match: IfNoneMatch = None) -> Response:
    """The plan file: canonical JSON, the same bytes for the same inputs. Its digest is the ETag."""
    with context.database.read() as session:
        plan = find_plan(context, session, plan_id)
    if plan.document is None:
        raise NotFound(
            "plan-has-no-document",
            f"A plan must fit its budget to have a document. Got {plan.status} for {plan.budget!r}. "
            "See least_budget in the plan.",
            extra={"least_budget": dict(plan.result.get("least_budget") or {})},
        )
    etag = f'"{plan.digest}"'
    headers = {"ETag": etag, "Content-Disposition": f'attachment; filename="bitplan-{plan.id}.json"'}
    if matches(etag, if_none_match):
        return not_modified(etag)
    return Response(canonical_json(plan.document), headers=headers, media_type="application/json")


@router.post("/plans/{plan_id}/measure", status_code=202, response_model=Job)
def measure_plan(plan_id: PlanId, context: Ctx, key: IdempotencyKey = None) -> Response:
    """Queue a job that measures a plan and its rivals on the reporting part; asking twice is one job."""

    def create(session: Session) -> Answer:
        plan = find_plan(context, session, plan_id)
        if plan.document is None:
            raise Conflict(
                "plan-has-no-document",
                f"A plan must fit its budget to be measured. Got {plan.status}. Solve for a larger budget "
                "first.",
            )
        return accepted(_measurement(context, session, plan))

    return once(context, key, f"POST /v1/plans/{plan_id}/measure", None, create)


def _asks(body: PlansRequest, job: JobRecord) -> list[Ask]:
    """One question per budget; what the body leaves out is as the job has it."""
    own = {name: value for name, value in body.model_dump(mode="json").items() if value is not None}
    costs = cost_request(own, job.request).members
    request = {**without_costs(job.request), **without_costs(own), **costs}
    metric = body.metric or deciding_metric(job.request)
    name = in_context(metric, body.context) if body.context else metric
    return [Ask.of(request, budget, name) for budget in body.budgets]


def _solve(context: Context, job_id: str, body: PlansRequest) -> list[Question]:
    """Each question with the digest of its settings and its answer; None where the answer is stored already.

    Solving may take seconds, so it holds no write transaction.
    """
    try:
        with context.database.read() as session:
            job = search_job(find_job(context, session, job_id))
            _check_objective(body, job)
            asks = _asks(body, job)
            first = asks[0]
            metrics = list(
                dict.fromkeys((str(first.metric), *(n for ask in asks for n in ask.named_metrics)))
            )
            inputs = planning_inputs(context, session, job, metrics, first.pins, first.costs)
            if isinstance(parse_objective(first.objective), Quadratic):
                inputs = with_interactions(context, job, inputs)
            settings = digest(["solve", first.settings_digest(inputs.menu)])
            known = [plans.find(session, job_id, ask.budget, settings) for ask in asks]
        return [
            (ask, settings, _timed(inputs, ask) if plan is None else None)
            for ask, plan in zip(asks, known, strict=True)
        ]
    except PLANNING_ERRORS as error:
        raise planning_problem(error) from None


def _timed(inputs: PlanningInputs, ask: Ask) -> Solved:
    with metrics.timed(metrics.RESOLVE_SECONDS):
        return solve_budget(inputs, ask)


def _check_objective(body: PlansRequest, job: JobRecord) -> None:
    """Its metrics must be the search's. Raises ObjectiveError."""
    fault = None if body.objective is None else objective_fault(body.objective, job.request["metrics"])
    if fault is not None:
        raise ObjectiveError(fault)


def _stored(context: Context, session: Session, job_id: str, solved: Question) -> PlanRecord:
    ask, settings, answer = solved
    if answer is None:
        known = plans.find(session, job_id, ask.budget, settings)
        assert known is not None, "plans are deleted only with their job"
        return known
    return plans.insert(
        session,
        job_id=job_id,
        budget=ask.budget,
        settings_digest=settings,
        status=answer.status,
        digest=None if answer.plan is None else answer.plan.digest,
        document=None if answer.plan is None else answer.plan.as_json(),
        result=answer.result,
        tenant=context.tenant,
    )


def _measurement(context: Context, session: Session, plan: PlanRecord) -> JobRecord:
    """The measurement of this plan that waits or runs, or a new one."""
    request, kind = {"plan": plan.id, "job": plan.job_id}, JobKind.MEASURE_PLAN
    content = digest([kind, request])
    return queued_once(context, session, kind, request, content, is_there=lambda job: False)
