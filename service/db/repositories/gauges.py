"""How much there is of everything at this moment, for monitoring."""

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import Session

from service.db.engine import database_clock
from service.db.repositories.leases import HELD
from service.db.tables import BlobRow, JobRow, now
from service.records import Gauges
from service.states import JobState


def read(session: Session, free_bytes: int) -> Gauges:
    """The gauges of the database; `free_bytes` are those of the store's disk."""
    grouped = select(JobRow.kind, JobRow.state, func.count()).group_by(JobRow.kind, JobRow.state)
    counts = {(kind, state): count for kind, state, count in session.execute(grouped)}
    queued = JobRow.state == JobState.QUEUED.value
    oldest = session.scalar(
        select(JobRow.created_at).where(queued).order_by(JobRow.created_at, JobRow.id).limit(1)
    )
    held = JobRow.state.in_(HELD)
    expired = and_(held, JobRow.lease_expires_at <= database_clock())
    blobs, blob_bytes = session.execute(select(func.count(), func.sum(BlobRow.size))).one()
    return Gauges(
        jobs=counts,
        oldest_queued_seconds=0.0 if oldest is None else max(0.0, (now() - oldest).total_seconds()),
        leases=_count(session, held),
        expired_leases=_count(session, expired),
        blobs=int(blobs),
        blob_bytes=int(blob_bytes or 0),
        free_bytes=free_bytes,
    )


def _count(session: Session, condition: ColumnElement[bool]) -> int:
    return int(session.scalar(select(func.count()).select_from(JobRow).where(condition)) or 0)
