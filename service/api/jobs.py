"""Jobs: submit, follow, cancel, resume, delete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import anyio
import structlog
from fastapi import APIRouter, Path, Query, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from quant.digest import digest
from service.api.conditional import IfNoneMatch, Prefer, matches, not_modified, wait_seconds
from service.api.context import After, Context, Ctx, Limit
from service.api.event_stream import STREAM_RESPONSES, Accept, LastEventId, open_stream, wants_stream
from service.api.guarded import Guarded
from service.api.idempotency import Answer, IdempotencyKey, once
from service.api.job_checks import check_job, require_future
from service.api.job_resources import Event, Job, job_members
from service.api.lookup import find_job
from service.api.pages import next_cursor, page_response, position
from service.api.polled import Polled, etag_of, retry_headers
from service.api.quotas import UNKNOWN, require_bytes, require_job
from service.api.resources import Page
from service.api.webhooks import attach, identity_of
from service.db.repositories import events, jobs
from service.errors import Conflict
from service.records import JobRecord
from service.states import PENDING, IllegalTransition, JobKind, JobState
from service.wire import LocalJobRequest, ResumeRequest, SubmitRequest

polls = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=Polled)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=Guarded)
OF_ITS_OWN = {"deadline", "webhook"}
"""What of a request is its job's alone: one that resumes it has others."""
ALIVE = PENDING | {JobState.SUCCEEDED}

log = structlog.get_logger()
JobId = Annotated[str, Path(max_length=100)]


@router.post("", status_code=202, response_model=Job)
def submit(body: SubmitRequest, context: Ctx, key: IdempotencyKey = None) -> Response:
    """Queue a search."""
    request = body.model_dump(mode="json", exclude=OF_ITS_OWN)

    def create(session: Session) -> Answer:
        require_future(body.deadline)
        check_job(context, session, body)
        require_job(context, session)
        job = jobs.create(
            session,
            kind=JobKind.SEARCH,
            request=request,
            request_digest=digest(request),
            tenant=context.tenant,
            deadline=body.deadline,
        )
        attach(context, session, job, body.webhook)
        return accepted(job)

    return once(context, key, "POST /v1/jobs", {**request, **_identity_of(body)}, create)


@router.get("", response_model=Page[Job])
def list_jobs(
    context: Ctx,
    limit: Limit = 50,
    cursor: After = None,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    kind: Annotated[JobKind | None, Query(description="Only jobs of this kind.")] = JobKind.SEARCH,
) -> Response:
    """Jobs, the newest first; searches unless another kind is asked for."""
    with context.database.read() as session:
        rows = jobs.list_page(
            session,
            limit=limit,
            after=position(context.cursors, "jobs", cursor),
            state=state,
            kind=kind,
            tenant=context.tenant,
        )
    return page_response(
        [job_members(row) for row in rows], next_cursor(context.cursors, "jobs", rows, limit)
    )


@polls.get("/{job_id}", response_model=Job, responses={304: {"description": "Nothing changed."}})
async def get_job(
    job_id: JobId, context: Ctx, if_none_match: IfNoneMatch = None, prefer: Prefer = None
) -> Response:
    """The job as it stands. With `Prefer: wait=N` the answer comes when it has ended, and with If-None-Match
    too when it has changed.
    """
    job = await run_in_threadpool(_read, context, job_id)
    if seconds := wait_seconds(prefer):
        job = await _awaited(context, job, if_none_match, seconds)
    if matches(etag_of(job), if_none_match):
        return not_modified(etag_of(job), retry_headers(job))
    headers = {"ETag": etag_of(job), **retry_headers(job)}
    return Response(Job.of(job).model_dump_json(), headers=headers, media_type="application/json")


@router.post("/{job_id}/cancel", status_code=202, response_model=Job)
def cancel(job_id: JobId, context: Ctx) -> Response:
    """Stop the job; its scores are kept. Cancelling twice is once."""
    with context.database.write() as session:
        find_job(context, session, job_id)
        try:
            answer = accepted(jobs.request_cancel(session, job_id))
        except IllegalTransition as error:
            raise Conflict(
                "job-finished",
                f"A job must be queued or running to be cancelled. Got {error.old}. It has ended.",
            ) from None
    return Response(
        answer.body.model_dump_json(), answer.status, dict(answer.headers), media_type="application/json"
    )


@router.post("/{job_id}/resume", status_code=202, response_model=Job)
def resume(
    job_id: JobId, context: Ctx, body: ResumeRequest | None = None, key: IdempotencyKey = None
) -> Response:
    """Queue a new job with the same request, which finds the scores of this one stored."""
    own = body or ResumeRequest()

    def create(session: Session) -> Answer:
        require_future(own.deadline)
        job = find_job(context, session, job_id)
        if not job.finished or job.state == JobState.SUCCEEDED:
            raise Conflict(
                "job-not-resumable",
                f"A job must have failed, expired or been cancelled to be resumed. Got {job.state}. "
                "Wait for it, or ask a succeeded one for other plans at /plans.",
            )
        if job.kind == JobKind.SEARCH:
            check_job(context, session, LocalJobRequest.model_validate(job.request))
        require_job(context, session)
        made = jobs.create(
            session,
            kind=job.kind,
            request=job.request,
            request_digest=job.request_digest,
            predecessor=job.id,
            tenant=context.tenant,
            deadline=own.deadline,
        )
        attach(context, session, made, own.webhook)
        return accepted(made)

    return once(context, key, f"POST /v1/jobs/{job_id}/resume", _identity_of(own) or None, create)


@router.delete("/{job_id}", status_code=204)
def delete(job_id: JobId, context: Ctx) -> None:
    """Delete a finished job with its plans, events and checkpoint file; scores stay for other jobs."""
    with context.database.write() as session:
        job = find_job(context, session, job_id)
        try:
            jobs.delete(session, job_id)
        except jobs.JobNotFinished as error:
            raise Conflict("job-not-finished", str(error)) from None
        forgotten = _file_of_none(context, session, job)
    if forgotten is not None:
        context.store.remove(forgotten)


@router.get("/{job_id}/events", response_model=Page[Event], responses=STREAM_RESPONSES)
def list_events(
    job_id: JobId,
    context: Ctx,
    limit: Limit = 200,
    cursor: After = None,
    accept: Accept = None,
    last_event_id: LastEventId = None,
) -> Page[Event] | Response:
    """What happened to the job, in order; with `Accept: text/event-stream` also what is still to happen."""
    if wants_stream(accept):
        return open_stream(context, job_id, last_event_id)
    kind = f"events of {job_id}"
    with context.database.read() as session:
        find_job(context, session, job_id)
        after = 0 if cursor is None else context.cursors.read(kind, cursor)
        rows = events.list_after(session, job_id, after, limit)
    more = context.cursors.make(kind, rows[-1].seq) if len(rows) == limit else None
    return Page(items=[Event.of(row) for row in rows], next_cursor=more)


def _identity_of(asked: SubmitRequest | ResumeRequest) -> dict[str, Any]:
    """What makes two requests differ that want the same search."""
    by = {} if asked.deadline is None else {"deadline": asked.deadline.isoformat()}
    return by | identity_of(asked.webhook)


def accepted(job: JobRecord) -> Answer:
    """202 with where to ask and when; the log tells which request the job came from."""
    log.info("job.accepted", job=job.id, kind=str(job.kind), state=str(job.state))
    headers = {"Location": f"/v1/jobs/{job.id}", "ETag": etag_of(job), **retry_headers(job)}
    return Answer(202, Job.of(job), headers)


def queued_once(
    context: Context,
    session: Session,
    kind: JobKind,
    request: Mapping[str, Any],
    content: str,
    is_there: Callable[[JobRecord], bool] = lambda job: True,
    *,
    size: int = 0,
) -> JobRecord:
    """The job whose digest is `content` that waits, runs or succeeded, or else a new one; `is_there` says
    whether what a finished one made is still to be had, `size` how many bytes a new one makes at least.
    """
    known = jobs.find_by_request(session, content, ALIVE, context.tenant)
    if known is not None and (not known.finished or is_there(known)):
        return known
    require_job(context, session)
    require_bytes(context, session, {UNKNOWN: size})
    return jobs.create(session, kind=kind, request=request, request_digest=content, tenant=context.tenant)


def _file_of_none(context: Context, session: Session, job: JobRecord) -> str | None:
    """The digest of a deleted job's checkpoint file, if no other job has the same."""
    if job.kind != JobKind.WRITE_CHECKPOINT or job.summary is None:
        return None
    digest = str(job.summary["sha256"])
    others = jobs.list_kind(session, job.kind, context.tenant)
    return None if any((other.summary or {}).get("sha256") == digest for other in others) else digest


async def _awaited(context: Context, job: JobRecord, if_none_match: str | None, seconds: float) -> JobRecord:
    """The job once it has ended, has changed for a client that knows an ETag, or after the seconds."""
    with anyio.move_on_after(seconds), context.watcher.topic(job.id) as topic:
        while not (job.finished or context.watcher.closing):
            if if_none_match is not None and not matches(etag_of(job), if_none_match):
                break
            signal, standing = topic.signal, topic.standing
            if topic.gone or (standing is not None and standing.version > job.version):
                job = await run_in_threadpool(_read, context, job.id)
            else:
                await signal.wait()
    return job


def _read(context: Context, job_id: str) -> JobRecord:
    with context.database.read() as session:
        return find_job(context, session, job_id)
