"""Which metric to trust: a job measures sampled plans of a search and correlates the metrics with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from sqlalchemy.orm import Session

from quant.digest import digest
from sensitivity.catalog import DECOUPLED
from service.api.context import Ctx
from service.api.guarded import Guarded
from service.api.idempotency import Answer, IdempotencyKey, once
from service.api.job_checks import check_job
from service.api.job_inputs import search_job
from service.api.job_resources import Job
from service.api.jobs import JobId, accepted, queued_once
from service.api.lookup import find_job
from service.api.polled import RETRY_SECONDS
from service.api.resources import Json, Resource
from service.db.repositories import jobs
from service.errors import Conflict, NotFound
from service.picking import settled
from service.records import JobRecord
from service.states import JobKind, JobState
from service.wire import CorrelationJob, CorrelationRequest, LocalJobRequest

router = APIRouter(prefix="/v1/jobs", tags=["scores"], route_class=Guarded)


class Coefficient(Resource):
    """A rank correlation with its 95 % interval."""

    value: float
    low: float
    high: float


class ScoreModel(Resource):
    """Something that predicts how good a plan is."""

    name: str
    metrics: list[str] = Field(description="What it is made of.")
    weight: float = Field(description="Of the interactions; 0 for the sum of one metric.")
    forwards: float | None = Field(None, description="What it cost, in forward passes of one sample.")
    stability: float | None = Field(
        None, description="How alike two halves of a metric's samples order its scores, stepped up to all."
    )
    resolved: float | None = Field(
        None, description="Share of pairs of schemes of one layer that paired samples tell apart."
    )


class PlanCorrelation(Resource):
    """How one score model ranks one kind of plans; null where there is nothing to rank."""

    score: str
    plans: str = Field(description="random, near (the optimum of the first metric), all (solvers' plans too)")
    spearman: Coefficient | None
    kendall: Coefficient | None


class MeasuredPlans(Resource):
    """The plans of one kind that were measured."""

    count: int
    least: float | None = Field(description="The least mean divergence.")
    most: float | None
    reliability: float | None = Field(
        description="How alike two halves of the samples rank these plans, stepped up to all of them."
    )


class SolverPlan(Resource):
    """A plan that a search would consider, as it was measured."""

    source: str
    bits_per_weight: float
    divergence: Json


class BudgetCorrelations(Resource):
    """The answer for one budget; empty where no plan fits."""

    budget: str
    status: str = Field(description="optimal, feasible, infeasible, unknown")
    least_budget: Json
    plans: dict[str, MeasuredPlans]
    correlations: list[PlanCorrelation]
    solver_plans: list[SolverPlan]


class Correlations(Resource):
    """How well each metric ranks measured plans, at each budget."""

    job: str | None = Field(description="The search.")
    part: str = Field(description="The part of the calibration data that plans were measured on.")
    samples: int
    divergence: str
    notes: list[str] = Field([], description="Where metrics could not be computed, and what stands for them.")
    scores: list[ScoreModel]
    budgets: list[BudgetCorrelations]


@router.post("/{job_id}/correlations", status_code=202, response_model=Job)
def correlate(job_id: JobId, body: CorrelationRequest, context: Ctx, key: IdempotencyKey = None) -> Response:
    """Queue a job that measures random plans, plans near the optimum and solvers' plans at each budget, and
    correlates every metric with what was measured. Asking twice is one job.
    """

    def create(session: Session) -> Answer:
        search = search_job(find_job(context, session, job_id))
        asked = _asked(search, body)
        check_job(context, session, asked.search)
        request = asked.model_dump(mode="json")
        return accepted(queued_once(context, session, JobKind.CORRELATE, request, digest(request)))

    return once(context, key, f"POST /v1/jobs/{job_id}/correlations", body.model_dump(mode="json"), create)


@router.get("/{job_id}/correlations")
def get_correlations(job_id: JobId, context: Ctx) -> Correlations:
    """The newest answer. 409 with Retry-After while the first one is being measured."""
    with context.database.read() as session:
        find_job(context, session, job_id)
        newest = jobs.newest_about(session, JobKind.CORRELATE, job_id, context.tenant)
    return Correlations.model_validate(_summary(job_id, newest))


def _asked(search: JobRecord, body: CorrelationRequest) -> CorrelationJob:
    """The search's request with the budgets and metrics of the body. Raises RequestValidationError."""
    request = settled(search.request, search.summary)
    try:
        return CorrelationJob(
            search=LocalJobRequest.model_validate(request | _changes(request, body)),
            plans=body.plans,
            every_stored=body.metrics is None,
            job=search.id,
        )
    except ValidationError as error:
        faults: Sequence[Any] = error.errors(include_url=False)
        raise RequestValidationError(
            [{**fault, "loc": ("body", *fault["loc"])} for fault in faults]
        ) from None


def _changes(request: Mapping[str, Any], body: CorrelationRequest) -> dict[str, Any]:
    """What the body replaces. Metrics that it names are measured for every choice: nothing refines them, and
    what only metrics of the search needed is left out.
    """
    changes: dict[str, Any] = {} if body.budgets is None else {"budgets": body.budgets}
    if body.metrics is None:
        return changes
    kept = request.get("role_metrics", {}) if DECOUPLED in body.metrics else {}
    interactions = request["interactions"] and request.get("refine_metric") is None
    own = {"metrics": body.metrics, "refine_metric": None, "role_metrics": kept, "interactions": interactions}
    return changes | own


def _summary(job_id: str, newest: JobRecord | None) -> Json:
    """What the newest job that succeeded found. Raises NotFound or Conflict where none did."""
    if newest is None:
        raise NotFound(
            "correlations-not-found",
            f"Correlations must be asked for before they are read. Got none of {job_id}. "
            f"Ask with POST /v1/jobs/{job_id}/correlations.",
        )
    if newest.state == JobState.SUCCEEDED:
        return dict(newest.summary or {})
    if not newest.finished:
        raise Conflict(
            "correlations-not-ready",
            f"The correlations must have been measured. Got {newest.id}, which is {newest.state}. Ask later.",
            extra={"job": newest.id},
            headers={"Retry-After": RETRY_SECONDS},
        )
    why = (newest.problem or {}).get("detail", "it has no result")
    raise Conflict(
        "correlations-failed",
        f"The correlations must have been measured. Got {newest.id}, which is {newest.state}: {why} "
        "Correct that and POST again.",
        extra={"job": newest.id, "cause": dict(newest.problem or {})},
    )
