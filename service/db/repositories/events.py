"""What happened to a job, in order."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.repositories.rows import record_of
from service.db.tables import EventRow
from service.records import EventRecord


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
