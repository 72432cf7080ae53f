"""Leases: who runs which job, and the fence that stops everybody else.

A claim raises the job's epoch by one. Every later write of the runner names its epoch, so a runner that was
paused past its lease changes nothing. Lease times are compared with the database's clock alone.
"""

# ruff: noqa: N818 - an error is named after what went wrong

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from sqlalchemy import ColumnElement, Subquery, and_, func, or_, select
from sqlalchemy.orm import Session

from service.db.engine import database_clock
from service.db.repositories import events, tenants
from service.db.repositories.jobs import drop_lease, locked, record_of_job, transition
from service.db.tables import EventRow, JobRow, TenantRow
from service.records import JobRecord
from service.states import TERMINAL, JobKind, JobState, Stage

RECLAIMED, DIED = "reclaimed", "the runner died"
"""The event, and the reason of an event, that tell of a lost runner."""
HELD = (JobState.RUNNING.value, JobState.CANCELLING.value)


class LeaseLost(RuntimeError):
    """Another runner holds the job now, or it has ended: this one must stop and must write nothing."""

    def __init__(self, job_id: str, epoch: int, found: str):
        super().__init__(f"Job {job_id} must be held with epoch {epoch}. Got {found}.")
        self.job_id, self.epoch = job_id, epoch


@dataclass(frozen=True)
class Owner:
    """Who claims: a name of its own, and the process that must be alive for the lease to mean anything.

    `process` tells processes apart that had the same pid one after the other (boot and start time).
    """

    name: str
    host: str
    pid: int
    process: str


def claim(
    session: Session,
    owner: Owner,
    lease_seconds: float,
    kinds: Collection[JobKind] | None = None,
    most_running: int = 0,
) -> JobRecord | None:
    """Claim a job that is queued or whose lease has expired, or None when there is none: the oldest of the
    tenant that has the fewest running. One that has as many as it may (its own quota, else `most_running`; 0
    is no limit) waits.

    PostgreSQL skips jobs that another runner is claiming at this moment; SQLite claims one after the other.
    A job that is being cancelled comes back in state cancelling: all that is left to do is `finish`.
    """
    free = _free_now()
    if kinds is not None:
        free = and_(free, JobRow.kind.in_([kind.value for kind in kinds]))
    return _claim(session, free, owner, lease_seconds, most_running)


def claim_job(session: Session, job_id: str, owner: Owner, lease_seconds: float) -> JobRecord | None:
    """Claim this one job if it is queued or its lease has expired, else None."""
    return _claim(session, and_(_free_now(), JobRow.id == job_id), owner, lease_seconds)


def expire(session: Session, problem: Mapping[str, Any]) -> tuple[JobRecord, ...]:
    """End the jobs that nobody runs and whose deadline has passed, with this problem; which ones."""
    overdue = and_(
        _free_now(), JobRow.deadline_at <= database_clock(), JobRow.state != JobState.CANCELLING.value
    )
    query = select(JobRow).where(overdue).with_for_update(skip_locked=True)
    return tuple(_end(session, row, JobState.EXPIRED, problem) for row in session.scalars(query).all())


def _free_now() -> ColumnElement[bool]:
    expired = and_(JobRow.state.in_(HELD), JobRow.lease_expires_at <= database_clock())
    return or_(JobRow.state == JobState.QUEUED.value, expired)


def _claim(
    session: Session, free: ColumnElement[bool], owner: Owner, lease_seconds: float, most_running: int = 0
) -> JobRecord | None:
    running, most = _running(), func.coalesce(TenantRow.quota_running, most_running)
    query = (
        select(JobRow, most)
        .outerjoin(running, running.c.tenant == JobRow.tenant)
        .outerjoin(TenantRow, TenantRow.name == JobRow.tenant)
        .where(free, or_(most == 0, func.coalesce(running.c.jobs, 0) < most))
        .order_by(func.coalesce(running.c.jobs, 0), JobRow.created_at, JobRow.id)
    )
    found = session.execute(query.limit(1).with_for_update(of=JobRow, skip_locked=True)).first()
    if found is None or (found[1] and not _may_run(session, found[0].tenant, found[1])):
        return None
    row = found[0]
    row.epoch += 1
    row.version += 1
    row.lease_owner, row.lease_host = owner.name, owner.host
    row.lease_pid, row.lease_process = owner.pid, owner.process
    _extend(session, row, lease_seconds)
    facts = {"epoch": row.epoch}
    if row.state == JobState.QUEUED:
        return transition(session, row, JobState.RUNNING, facts)
    events.append(session, row.id, RECLAIMED, facts | _where(row))
    return record_of_job(row)


def _running() -> Subquery:
    """How many jobs of each tenant are held by a runner whose lease lasts."""
    held = and_(JobRow.state.in_(HELD), JobRow.lease_expires_at > database_clock())
    counted = select(JobRow.tenant, func.count().label("jobs")).where(held)
    return counted.group_by(JobRow.tenant).subquery("running")


def _may_run(session: Session, tenant: str, most: int) -> bool:
    """Whether the tenant has fewer jobs running, now that no other runner can claim one of its jobs."""
    tenants.ensure(session, tenant)
    running = _running()
    held = session.execute(select(running.c.jobs).where(running.c.tenant == tenant)).scalar() or 0
    return bool(held < most)


def _where(row: JobRow) -> dict[str, Any]:
    """How far a job was when its runner was lost."""
    return {"stage": row.stage, "done": row.done, "total": row.total}


def lost_in_a_row(session: Session, job_id: str) -> int:
    """How many of the job's last runners were lost (died, or let their lease expire) at one and the same
    point of its work.
    """
    kinds = (RECLAIMED, JobState.QUEUED.value)
    query = select(EventRow.type, EventRow.data).where(EventRow.job_id == job_id, EventRow.type.in_(kinds))
    rows = session.execute(query.order_by(EventRow.seq.desc()))
    places = [
        (data.get("stage"), data.get("done"), data.get("total"))
        for kind, data in rows
        if kind == RECLAIMED or data.get("reason") == DIED
    ]
    return len(list(takewhile(lambda place: place == places[0], places)))


def _extend(session: Session, row: JobRow, lease_seconds: float) -> None:
    clock = session.scalars(select(database_clock())).one()
    row.lease_expires_at = clock + lease_seconds
    session.flush()


def fence(session: Session, job_id: str, epoch: int) -> JobRow:
    """Lock the job's row, which must be held with this epoch, else raise `LeaseLost`. For repositories
    only.
    """
    try:
        row = locked(session, job_id)
    except LookupError:
        raise LeaseLost(job_id, epoch, "a job that was deleted") from None
    if row.epoch != epoch or row.state not in HELD:
        raise LeaseLost(job_id, epoch, f"epoch {row.epoch}, state {row.state}")
    return row


def hold(session: Session, job_id: str, epoch: int) -> JobRecord:
    """Begin a fenced transaction: everything written after it in this transaction is covered. Raises
    `LeaseLost`.
    """
    return record_of_job(fence(session, job_id, epoch))


def heartbeat(session: Session, job_id: str, epoch: int, lease_seconds: float) -> JobRecord:
    """Extend the lease; the record tells whether a cancellation was asked for. Raises `LeaseLost`."""
    row = fence(session, job_id, epoch)
    _extend(session, row, lease_seconds)
    return record_of_job(row)


def release(session: Session, job_id: str, epoch: int, reason: str = "released") -> JobRecord:
    """Give the job back: queued again at once, or cancelled when that was asked for. Raises `LeaseLost`."""
    row = fence(session, job_id, epoch)
    if row.state == JobState.CANCELLING:
        return transition(session, row, JobState.CANCELLED)
    return transition(session, row, JobState.QUEUED, {"reason": reason})


def progress(
    session: Session,
    job_id: str,
    epoch: int,
    *,
    stage: Stage,
    done: int,
    total: int,
    eta_seconds: float | None = None,
) -> JobRecord:
    """Write where the job stands; a new stage is an event. Raises `LeaseLost`."""
    row = fence(session, job_id, epoch)
    if row.stage != stage.value:
        events.append(session, job_id, "stage", {"stage": stage.value, "total": total})
    row.stage, row.done, row.total, row.eta_seconds = stage.value, done, total, eta_seconds
    row.version += 1
    session.flush()
    return record_of_job(row)


def set_score_set(session: Session, job_id: str, epoch: int, score_set: str) -> JobRecord:
    """Say which score set the job fills; the set must exist. Raises `LeaseLost`."""
    row = fence(session, job_id, epoch)
    row.score_set = score_set
    row.version += 1
    session.flush()
    return record_of_job(row)


def set_summary(session: Session, job_id: str, epoch: int, summary: Mapping[str, Any]) -> JobRecord:
    """Say what is known of the job before it ends; its end replaces it. Raises `LeaseLost`."""
    row = fence(session, job_id, epoch)
    _tell(row, summary)
    row.version += 1
    session.flush()
    return record_of_job(row)


def finish(
    session: Session,
    job_id: str,
    epoch: int,
    state: JobState,
    *,
    summary: Mapping[str, Any] | None = None,
    problem: Mapping[str, Any] | None = None,
) -> JobRecord:
    """End the job; one that is being cancelled ends cancelled, whatever `state` says. Raises `LeaseLost`."""
    if state not in TERMINAL:
        raise ValueError(f"A job must end in a final state ({', '.join(sorted(TERMINAL))}). Got {state}.")
    row = fence(session, job_id, epoch)
    if row.state == JobState.CANCELLING:
        state, problem = JobState.CANCELLED, None
    elif state == JobState.CANCELLED:
        transition(session, row, JobState.CANCELLING)
    if summary is not None:
        _tell(row, summary)
    return _end(session, row, state, problem)


def _end(session: Session, row: JobRow, state: JobState, problem: Mapping[str, Any] | None) -> JobRecord:
    row.problem = None if problem is None else dict(problem)
    return transition(session, row, state, {} if problem is None else {"problem": dict(problem)})


def _tell(row: JobRow, summary: Mapping[str, Any]) -> None:
    """Write the summary; its member `inventory` into the column of that name."""
    told = dict(summary)
    row.inventory = told.pop("inventory", None)
    row.summary = told


def held_on(session: Session, host: str) -> tuple[JobRecord, ...]:
    """The jobs that processes of this host hold, dead or alive."""
    query = select(JobRow).where(JobRow.state.in_(HELD), JobRow.lease_host == host)
    return tuple(record_of_job(row) for row in session.scalars(query.order_by(JobRow.created_at, JobRow.id)))


def take_back(session: Session, dead: Iterable[JobRecord]) -> int:
    """Free the jobs of processes that are known to be dead; how many still had the lease that was judged."""
    freed = 0
    for job in dead:
        row = locked(session, job.id)
        if row.state in HELD and row.epoch == job.epoch:
            _free(session, row)
            freed += 1
    return freed


def _free(session: Session, row: JobRow) -> None:
    row.epoch += 1
    if row.state == JobState.CANCELLING:
        transition(session, row, JobState.CANCELLED)
        return
    drop_lease(row)
    transition(session, row, JobState.QUEUED, {"reason": DIED, **_where(row)})
