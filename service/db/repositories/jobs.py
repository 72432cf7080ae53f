"""Jobs: creation, reading, and the one function that changes their state."""

# ruff: noqa: N818 - an error is named after what went wrong

from collections.abc import Collection, Mapping
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Row, Select, bindparam, func, select
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import Session

from service.db.engine import database_clock
from service.db.repositories import events, webhooks
from service.db.repositories.rows import (
    chunks,
    columns_of,
    names_of,
    page_parameters,
    page_statement,
    record_of,
)
from service.db.tables import EventRow, JobRow, now
from service.ids import new_id
from service.records import Cursor, JobRecord, StandingRecord, VersionRecord
from service.states import TERMINAL, JobKind, JobState, Stage, check_transition

COLUMNS = columns_of(JobRecord, JobRow)
ONE = select(*COLUMNS).where(JobRow.id == bindparam("job"))
PER_QUERY = 500
"""Jobs per statement of `standings` and `versions`."""


class JobNotFinished(ValueError):
    """Only a finished job may be deleted."""


def record_of_job(row: JobRow) -> JobRecord:
    """The record of a row that this transaction holds."""
    return record_of(JobRecord, row, kind=JobKind, state=JobState, stage=Stage)


def create(
    session: Session,
    *,
    kind: JobKind,
    request: Mapping[str, Any],
    request_digest: str,
    predecessor: str | None = None,
    tenant: str = "default",
    deadline: datetime | None = None,
) -> JobRecord:
    """A new queued job with its first event; it expires unless it has ended by the deadline."""
    row = JobRow(
        id=new_id("job"),
        tenant=tenant,
        deadline_at=None if deadline is None else deadline.timestamp(),
        kind=kind.value,
        state=JobState.QUEUED.value,
        request=dict(request),
        request_digest=request_digest,
        predecessor=predecessor,
    )
    session.add(row)
    session.flush()
    events.append(
        session, row.id, JobState.QUEUED.value, {} if predecessor is None else {"predecessor": predecessor}
    )
    return record_of_job(row)


def get(session: Session, job_id: str, tenant: str | None = None) -> JobRecord | None:
    """The job, or None; with `tenant`, only when it is that tenant's."""
    row = session.execute(ONE, {"job": job_id}).first()
    return _record(row) if row is not None and tenant in (None, row.tenant) else None


def inventory(session: Session, job_id: str) -> Mapping[str, Any] | None:
    """The inventory that the job planned with, as JSON; None until it has ended."""
    return session.scalar(select(JobRow.inventory).where(JobRow.id == job_id))


def list_page(
    session: Session,
    *,
    limit: int = 50,
    after: Cursor | None = None,
    state: JobState | None = None,
    kind: JobKind | None = None,
    tenant: str = "default",
) -> tuple[JobRecord, ...]:
    """A page of a tenant's jobs, the newest first."""
    statement = _page_statement(after is not None, state is not None, kind is not None)
    values = {
        "job_state": None if state is None else state.value,
        "kind": None if kind is None else kind.value,
    }
    rows = session.execute(statement, page_parameters(tenant, limit, after) | values)
    return tuple(_record(row) for row in rows)


@cache
def _page_statement(later: bool, of_state: bool, of_kind: bool) -> Select[Any]:
    conditions = [JobRow.state == bindparam("job_state")] if of_state else []
    conditions += [JobRow.kind == bindparam("kind")] if of_kind else []
    return page_statement(select(*COLUMNS), JobRow, later, *conditions)


def _record(row: Row[Any]) -> JobRecord:
    """The record of `COLUMNS`."""
    values = dict(zip(names_of(JobRecord), row, strict=True))
    values["kind"], values["state"] = JobKind(values["kind"]), JobState(values["state"])
    values["stage"] = None if values["stage"] is None else Stage(values["stage"])
    return JobRecord(**values)


def find_by_request(
    session: Session, request_digest: str, states: frozenset[JobState], tenant: str = "default"
) -> JobRecord | None:
    """The newest job with this request in one of `states`, or None."""
    query = select(JobRow).where(
        JobRow.tenant == tenant,
        JobRow.request_digest == request_digest,
        JobRow.state.in_([state.value for state in states]),
    )
    row = session.scalars(query.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(1)).first()
    return None if row is None else record_of_job(row)


def list_kind(session: Session, kind: JobKind, tenant: str = "default") -> tuple[JobRecord, ...]:
    """All jobs of a kind, the oldest first."""
    query = select(JobRow).where(JobRow.tenant == tenant, JobRow.kind == kind.value)
    return tuple(record_of_job(row) for row in session.scalars(query.order_by(JobRow.created_at, JobRow.id)))


def newest_about(session: Session, kind: JobKind, job_id: str, tenant: str = "default") -> JobRecord | None:
    """The newest job of a kind whose request names another `job`: one that succeeded, if any did."""
    query = select(JobRow).where(
        JobRow.tenant == tenant, JobRow.kind == kind.value, JobRow.request["job"].as_string() == job_id
    )
    succeeded = (JobRow.state == JobState.SUCCEEDED.value).desc()
    row = session.scalars(
        query.order_by(succeeded, JobRow.created_at.desc(), JobRow.id.desc()).limit(1)
    ).first()
    return None if row is None else record_of_job(row)


def unfinished(session: Session, tenant: str = "default") -> tuple[JobRecord, ...]:
    """The tenant's jobs that have not ended, the oldest first."""
    states = [state.value for state in JobState if state not in TERMINAL]
    query = select(JobRow).where(JobRow.tenant == tenant, JobRow.state.in_(states))
    return tuple(record_of_job(row) for row in session.scalars(query.order_by(JobRow.created_at, JobRow.id)))


def standings(session: Session, job_ids: Collection[str]) -> dict[str, StandingRecord]:
    """Where jobs stand, by id; without those that do not exist. One statement for hundreds of jobs."""
    last = select(func.coalesce(func.max(EventRow.seq), 0)).where(EventRow.job_id == JobRow.id)
    query = select(
        JobRow.id,
        JobRow.state,
        JobRow.stage,
        JobRow.done,
        JobRow.total,
        JobRow.eta_seconds,
        JobRow.version,
        last.correlate(JobRow).scalar_subquery(),
    )
    found = {}
    for some in chunks(job_ids, PER_QUERY):
        for row in session.execute(query.where(JobRow.id.in_(some))):
            job_id, state, stage, *rest = row
            named = None if stage is None else Stage(stage)
            found[job_id] = StandingRecord(job_id, JobState(state), named, *rest)
    return found


def versions(session: Session, job_ids: Collection[str]) -> dict[str, VersionRecord]:
    """The versions of jobs, of whatever tenant, by id; without those that do not exist."""
    query = select(JobRow.id, JobRow.tenant, JobRow.state, JobRow.version)
    return {
        job_id: VersionRecord(job_id, tenant, JobState(state), version)
        for some in chunks(job_ids, PER_QUERY)
        for job_id, tenant, state, version in session.execute(query.where(JobRow.id.in_(some)))
    }


def locked(session: Session, job_id: str) -> JobRow:
    """The row, locked until the transaction ends. Raises LookupError. For repositories only."""
    row = session.get(JobRow, job_id, with_for_update=True, populate_existing=True)
    if row is None:
        raise LookupError(f"Job must exist. Got {job_id}.")
    return row


def transition(
    session: Session, row: JobRow, state: JobState, data: Mapping[str, Any] | None = None
) -> JobRecord:
    """Move a locked row to `state` with its event. Raises `IllegalTransition`. For repositories only."""
    check_transition(row.id, JobState(row.state), state)
    row.state = state.value
    row.version += 1
    if state == JobState.RUNNING:
        row.started_at = row.started_at or now()
    if state in TERMINAL:
        row.finished_at = now()
        row.eta_seconds = None
    if state in TERMINAL or state == JobState.QUEUED:
        drop_lease(row)
    session.flush()
    events.append(session, row.id, state.value, data)
    if state in TERMINAL:
        webhooks.fall_due(session, row)
    return record_of_job(row)


def drop_lease(row: JobRow) -> None:
    """Nobody holds the job any more; the epoch stays."""
    row.lease_owner = row.lease_host = row.lease_pid = row.lease_process = row.lease_expires_at = None


def request_cancel(session: Session, job_id: str) -> JobRecord:
    """Ask a job to stop; one that nobody runs is cancelled at once. Asking again changes nothing.

    Raises LookupError for an unknown job and `IllegalTransition` for a finished one that was not cancelled.
    """
    row = locked(session, job_id)
    if row.state in (JobState.CANCELLING, JobState.CANCELLED):
        return record_of_job(row)
    unattended = row.state == JobState.QUEUED or _lease_expired(session, row)
    row.cancel_requested = True
    record = transition(session, row, JobState.CANCELLING)
    return transition(session, row, JobState.CANCELLED) if unattended else record


def _lease_expired(session: Session, row: JobRow) -> bool:
    clock = session.scalars(select(database_clock())).one()
    return row.lease_expires_at is not None and row.lease_expires_at <= clock


def delete(session: Session, job_id: str) -> None:
    """Delete a finished job with its events and plans; scores stay. Raises LookupError and
    `JobNotFinished`.
    """
    row = locked(session, job_id)
    if JobState(row.state) not in TERMINAL:
        raise JobNotFinished(
            f"Job {job_id} must be finished to be deleted. Got {row.state}. Cancel it first."
        )
    session.execute(delete_from(JobRow).where(JobRow.id == job_id))
