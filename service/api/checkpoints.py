"""Checkpoints: a job writes a plan's quantized weights, and its file is downloaded, whole or in parts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse
from sqlalchemy.orm import Session
from starlette.types import Receive, Scope, Send

from quant.catalog import CHECKPOINTS
from quant.checkpoints.front import lint
from quant.export.protocol import ExportError, ExportRefused
from quant.plan import plan_from_json
from service.api.conditional import IfNoneMatch, matches, not_modified
from service.api.context import Context, Ctx
from service.api.exports import deployment_of
from service.api.guarded import Guarded
from service.api.idempotency import Answer, IdempotencyKey, once
from service.api.job_resources import Job
from service.api.jobs import accepted, queued_once
from service.api.lookup import find_job, find_plan
from service.api.plans import PlanId
from service.api.polled import RETRY_SECONDS
from service.api.resources import items_of
from service.checkpoints import request_of, require_calibration, require_model
from service.db.repositories import jobs
from service.errors import Conflict, NotFound, Unprocessable
from service.records import JobRecord, PlanRecord
from service.states import JobKind, JobState
from service.wire import CheckpointRequest

router = APIRouter(prefix="/v1", tags=["checkpoints"], route_class=Guarded)
Consumer = Annotated[str, Query(max_length=100, description=f"One of {', '.join(CHECKPOINTS)}.")]


@router.get("/checkpoints")
def list_checkpoint_consumers() -> dict[str, Any]:
    """The consumers that a plan's weights can be written for, and what they get: a folder or a file."""
    return items_of(CHECKPOINTS, "name", "writes", "summary", "source")


@router.post("/plans/{plan_id}/checkpoint", status_code=202, response_model=Job)
def write_checkpoint(
    plan_id: PlanId, body: CheckpointRequest, context: Ctx, key: IdempotencyKey = None
) -> Response:
    """Queue a job that writes the plan's quantized weights for a consumer; asking twice is one job.

    A plan that the consumer cannot load is refused with every violation: layer, rule, and what the plan has.
    """
    request = body.model_dump(mode="json")
    _require_accepted(context, plan_id, body.consumer)

    def create(session: Session) -> Answer:
        plan = find_plan(context, session, plan_id)
        assert plan.document is not None, "a plan without a document is refused before"
        require_model(session, find_job(context, session, plan.job_id), context.tenant)
        require_calibration(session, plan_from_json(plan.document), context.tenant)
        return accepted(_job(context, session, plan, body))

    return once(context, key, f"POST /v1/plans/{plan_id}/checkpoint", request, create)


@router.get(
    "/plans/{plan_id}/checkpoint",
    response_class=Response,
    responses={206: {"description": "The part that Range asked for."}, 304: {"description": "Unchanged."}},
)
def get_checkpoint(
    plan_id: PlanId, consumer: Consumer, context: Ctx, if_none_match: IfNoneMatch = None
) -> Response:
    """The newest checkpoint of the plan for a consumer: a tar archive of the folder, or the one file.

    Its SHA-256 digest is the ETag; one Range is honored, so that a broken download can be continued. 409 with
    Retry-After while the job that writes it runs.
    """
    with context.database.read() as session:
        job = _newest(context, session, find_plan(context, session, plan_id), consumer)
    stored = _stored(context, job)
    etag = f'"{stored["sha256"]}"'
    if matches(etag, if_none_match):
        return not_modified(etag)
    headers = {"ETag": etag, "Content-Disposition": f'attachment; filename="{stored["file"]}"'}
    kind = "application/x-tar" if str(stored["file"]).endswith(".tar") else "application/octet-stream"
    return _Download(context.store.path(str(stored["sha256"])), headers=headers, media_type=kind)


class _Download(FileResponse):
    """A file of which one part may be asked for; a request for many parts gets the whole."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the file."""
        kept = [pair for pair in scope["headers"] if not (pair[0] == b"range" and b"," in pair[1])]
        await super().__call__({**scope, "headers": kept}, receive, send)


def _require_accepted(context: Context, plan_id: str, consumer: str) -> None:
    try:
        violations = lint(consumer, deployment_of(context, plan_id))
    except ExportError as error:
        raise Conflict("checkpoint-impossible", str(error)) from None
    if violations:
        raise Unprocessable(
            "checkpoint-refused",
            str(ExportRefused(consumer, violations)),
            extra={"violations": [asdict(item) for item in violations]},
        )


def _job(context: Context, session: Session, plan: PlanRecord, body: CheckpointRequest) -> JobRecord:
    """The job that writes this checkpoint or has written it, or a new one."""
    request, digest = request_of(plan, body.consumer, force=body.force)
    return queued_once(
        context,
        session,
        JobKind.WRITE_CHECKPOINT,
        request,
        digest,
        lambda job: _is_there(context, job),
        size=int((plan.result.get("resources") or {}).get("bytes", 0)),
    )


def _newest(context: Context, session: Session, plan: PlanRecord, consumer: str) -> JobRecord:
    """The newest finished job with its file, or else the newest job at all. Raises NotFound for none."""
    digests = [request_of(plan, consumer, force=force)[1] for force in (False, True)]
    for states in (frozenset({JobState.SUCCEEDED}), frozenset(JobState)):
        found = [jobs.find_by_request(session, digest, states, context.tenant) for digest in digests]
        known = [job for job in found if job is not None and (not job.finished or _is_there(context, job))]
        if known:
            return max(known, key=lambda job: (job.created_at, job.id))
    ended = [job for job in found if job is not None]
    if ended:
        return max(ended, key=lambda job: (job.created_at, job.id))
    raise NotFound(
        "checkpoint-not-found",
        f"A checkpoint must be written before it is downloaded. Got none of {plan.id} for"
        f" {consumer[:60]!r}. Ask for it with POST /v1/plans/{plan.id}/checkpoint.",
    )


def _is_there(context: Context, job: JobRecord) -> bool:
    return job.summary is not None and context.store.has(str(job.summary.get("sha256")))


def _stored(context: Context, job: JobRecord) -> dict[str, Any]:
    """The summary of a job whose file can be downloaded. Raises Conflict otherwise."""
    if not job.finished:
        raise Conflict(
            "checkpoint-not-ready",
            f"The checkpoint must have been written. Got {job.id}, which is {job.state}. Ask again later.",
            extra={"job": job.id},
            headers={"Retry-After": RETRY_SECONDS},
        )
    if not _is_there(context, job):
        why = (job.problem or {}).get("detail", "its file is gone")
        raise Conflict(
            "checkpoint-not-written",
            f"The checkpoint must have been written. Got {job.id}, which is {job.state}: {why}"
            " Correct that and POST again.",
            extra={"job": job.id, "cause": dict(job.problem or {})},
        )
    return dict(job.summary or {})
