"""Which models and calibration sets unfinished jobs need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from service.api.context import Context
from service.db.repositories import jobs, plans
from service.errors import Conflict
from service.records import JobRecord
from service.states import JobKind

INPUTS = ("model", "calibration")


def inputs_of(session: Session, job: JobRecord) -> dict[str, str]:
    """The model and the calibration set that a job reads, by kind; a verification outlives its model."""
    request = _request(session, job)
    return {kind: str(request[kind]) for kind in INPUTS if request.get(kind) is not None}


def _request(session: Session, job: JobRecord) -> Mapping[str, Any]:
    if job.kind == JobKind.VERIFY_MODEL:
        return {}
    if job.kind == JobKind.CORRELATE:
        return dict(job.request["search"])
    if job.kind in (JobKind.MEASURE_PLAN, JobKind.WRITE_CHECKPOINT):
        plan = plans.get(session, str(job.request["plan"]), job.tenant)
        search = None if plan is None else jobs.get(session, plan.job_id, job.tenant)
        return {} if search is None else search.request
    return job.request


def refuse_in_use(context: Context, session: Session, kind: str, ident: str) -> None:
    """Raise Conflict while an unfinished job needs this model or calibration set."""
    for job in jobs.unfinished(session, tenant=context.tenant):
        if inputs_of(session, job).get(kind) == ident:
            raise Conflict(
                f"{kind}-in-use",
                f"A {kind} must not be in use when it is deleted. Got job {job.id}, which is {job.state}. "
                "Wait for it or cancel it first.",
            )
