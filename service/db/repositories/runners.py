"""Runners that serve: each says every few seconds that it lives, and what it has counted."""

from collections.abc import Collection

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.db.engine import database_clock
from service.db.repositories.leases import Owner
from service.db.tables import RunnerRow
from service.records import RunnerRecord


def beat(session: Session, owner: Owner, version: str, metrics: str) -> None:
    """The runner lives, and has counted this."""
    clock = session.scalars(select(database_clock())).one()
    row = session.get(RunnerRow, owner.name, with_for_update=True)
    if row is None:
        row = RunnerRow(
            name=owner.name, host=owner.host, pid=owner.pid, process=owner.process, version=version
        )
        session.add(row)
    row.seen_at, row.metrics = clock, metrics
    session.flush()


def forget(session: Session, names: Collection[str]) -> None:
    """These runners have ended."""
    session.execute(delete(RunnerRow).where(RunnerRow.name.in_(sorted(names))))


def list_all(session: Session) -> tuple[RunnerRecord, ...]:
    """Every runner that has not said that it ends, the oldest first."""
    query = select(RunnerRow, database_clock()).order_by(RunnerRow.started_at, RunnerRow.name)
    return tuple(
        RunnerRecord(
            name=row.name,
            host=row.host,
            pid=row.pid,
            process=row.process,
            version=row.version,
            started_at=row.started_at,
            seconds_ago=max(0.0, clock - row.seen_at),
            metrics=row.metrics,
        )
        for row, clock in session.execute(query)
    )
