"""Finished units of work, and the faults of units that gave two answers."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.repositories.rows import insert_or_keep, record_of
from service.db.tables import FaultRow, UnitRow, now
from service.ids import new_id
from service.records import FaultRecord, MeasurementRecord, UnitRecord


def insert(
    session: Session,
    *,
    score_set: str,
    key: str,
    kind: str,
    unit: Mapping[str, Any],
    facts: Mapping[str, Any],
    artifact: str | None,
    job_id: str | None,
) -> bool:
    """Store a finished unit; True if it is new, False (and no change) if it was stored before."""
    values = {
        "score_set": score_set,
        "key": key,
        "kind": kind,
        "unit": dict(unit),
        "facts": dict(facts),
        "artifact": artifact,
        "job_id": job_id,
        "created_at": now(),
    }
    return insert_or_keep(session, UnitRow, values)


def get(session: Session, score_set: str, key: str) -> UnitRecord | None:
    """The stored unit, or None."""
    row = session.get(UnitRow, (score_set, key))
    return None if row is None else record_of(UnitRecord, row)


def keys(session: Session, score_set: str) -> frozenset[str]:
    """The keys of everything that is stored in a score set."""
    return frozenset(session.scalars(select(UnitRow.key).where(UnitRow.score_set == score_set)))


def list_kind(session: Session, score_set: str, kind: str) -> tuple[UnitRecord, ...]:
    """The stored units of one kind, ordered by key."""
    query = select(UnitRow).where(UnitRow.score_set == score_set, UnitRow.kind == kind)
    return tuple(record_of(UnitRecord, row) for row in session.scalars(query.order_by(UnitRow.key)))


def measurements(session: Session, score_set: str, part: str | None = None) -> tuple[MeasurementRecord, ...]:
    """The whole assignments that were measured, ordered by key; with `part`, on that part of the data
    alone.
    """
    records = (_measurement(unit) for unit in list_kind(session, score_set, "measure"))
    return tuple(record for record in records if part in (None, record.part))


def _measurement(unit: UnitRecord) -> MeasurementRecord:
    pairs = tuple((str(layer), str(scheme)) for layer, scheme in unit.unit["assignment"])
    return MeasurementRecord(
        score_set=unit.score_set,
        key=unit.key,
        part=str(unit.unit["part"]),
        assignment=pairs,
        facts=unit.facts,
        artifact=unit.artifact,
    )


def add_fault(
    session: Session, *, score_set: str, unit_key: str, kept: Mapping[str, Any], got: Mapping[str, Any]
) -> FaultRecord:
    """Keep the evidence that a repeated unit disagrees with its stored result."""
    row = FaultRow(id=new_id("fault"), score_set=score_set, unit_key=unit_key, kept=dict(kept), got=dict(got))
    session.add(row)
    session.flush()
    return record_of(FaultRecord, row)


def faults(session: Session, score_set: str) -> tuple[FaultRecord, ...]:
    """The faults of a score set, the oldest first."""
    query = select(FaultRow).where(FaultRow.score_set == score_set).order_by(FaultRow.at, FaultRow.id)
    return tuple(record_of(FaultRecord, row) for row in session.scalars(query))
