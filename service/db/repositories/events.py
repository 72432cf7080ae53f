"""What happened to a job, in order."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from service.db.repositories.rows import chunks, record_of
from service.db.tables import EventRow
from service.records import EventRecord

PER_QUERY = 200
"""Jobs per statement of `list_of`: a few hundred conditions are quick to plan on every database."""


def append(session: Session, job_id: str, type_: str, data: Mapping[str, Any] | None = None) -> EventRecord:
    """Append an event with the next sequence number.

    The caller holds the lock of the job's row (a fence, a transition), so that numbers have no gaps and no
    twins. A second terminal event breaks a unique index.
    """
    last = session.scalar(select(func.max(EventRow.seq)).where(EventRow.job_id == job_id)) or 0
    row = EventRow(job_id=job_id, seq=last + 1, type=type_, data=dict(data or {}))
    session.add(row)
    session.flush()
    return record_of(EventRecord, row)


def list_after(session: Session, job_id: str, seq: int = 0, limit: int = 200) -> tuple[EventRecord, ...]:
    """At most `limit` events whose number is above `seq`, in order."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > seq)
    rows = session.scalars(query.order_by(EventRow.seq).limit(limit))
    return tuple(record_of(EventRecord, row) for row in rows)


def list_of(session: Session, after: Mapping[str, int]) -> dict[str, list[EventRecord]]:
    """The events of many jobs whose number is above the one given for the job, each job's in order."""
    found: dict[str, list[EventRecord]] = {}
    for some in chunks(after.items(), PER_QUERY):
        later = or_(*(and_(EventRow.job_id == job_id, EventRow.seq > seq) for job_id, seq in some))
        for row in session.scalars(select(EventRow).where(later).order_by(EventRow.job_id, EventRow.seq)):
            found.setdefault(row.job_id, []).append(record_of(EventRecord, row))
    return found
