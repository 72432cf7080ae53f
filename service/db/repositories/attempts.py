"""How often a unit of a job has cost a worker its life: the count survives the runner."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.repositories.rows import record_of
from service.db.tables import AttemptRow
from service.records import AttemptRecord


def add(session: Session, job_id: str, unit_key: str, failure: Mapping[str, Any]) -> AttemptRecord:
    """Count one more failed attempt; the caller holds the job's fence."""
    row = session.get(AttemptRow, (job_id, unit_key))
    if row is None:
        row = AttemptRow(job_id=job_id, unit_key=unit_key, attempts=0, last_failure={})
        session.add(row)
    row.attempts += 1
    row.last_failure = dict(failure)
    session.flush()
    return record_of(AttemptRecord, row)


def list_job(session: Session, job_id: str) -> tuple[AttemptRecord, ...]:
    """Every unit of the job that failed at least once, ordered by key."""
    query = select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.unit_key)
    return tuple(record_of(AttemptRecord, row) for row in session.scalars(query))
