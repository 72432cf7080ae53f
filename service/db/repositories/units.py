"""Finished units of work, and the faults of units that gave two answers."""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.repositories.rows import insert_or_keep, record_of
from service.db.tables import FaultRow, UnitRow, now
from service.ids import new_id
from service.records import FaultRecord, UnitRecord

CHUNK = 500
"""Keys in one statement, which databases bound."""


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


def get_many(session: Session, score_set: str, keys: Collection[str]) -> dict[str, UnitRecord]:
    """Key -> stored unit, of those that are stored."""
    wanted = sorted(set(keys))
    found: dict[str, UnitRecord] = {}
    for start in range(0, len(wanted), CHUNK):
        chunk = wanted[start : start + CHUNK]
        query = select(UnitRow).where(UnitRow.score_set == score_set, UnitRow.key.in_(chunk))
        found |= {row.key: record_of(UnitRecord, row) for row in session.scalars(query)}
    return found


def keys(session: Session, score_set: str) -> frozenset[str]:
    """The keys of everything that is stored in a score set."""
    return frozenset(session.scalars(select(UnitRow.key).where(UnitRow.score_set == score_set)))


def list_kind(session: Session, score_set: str, kind: str) -> tuple[UnitRecord, ...]:
    """The stored units of one kind, ordered by key."""
    query = select(UnitRow).where(UnitRow.score_set == score_set, UnitRow.kind == kind)
    return tuple(record_of(UnitRecord, row) for row in session.scalars(query.order_by(UnitRow.key)))


def work(session: Session, score_set: str, job_id: str) -> dict[str, float]:
    """Forward passes of one sample that a job's units took, a backward pass counting 2: by stage, or by the
    part of the data that plans were measured on.
    """
    own = UnitRow.score_set == score_set, UnitRow.job_id == job_id
    spent: dict[str, float] = {}
    for kind, unit, facts in session.execute(select(UnitRow.kind, UnitRow.unit, UnitRow.facts).where(*own)):
        stage = unit["part"] if kind == "measure" else _STAGES.get(kind)
        if stage is not None:
            spent[stage] = spent.get(stage, 0.0) + float(facts.get("forwards", 0))
    return {stage: round(spent[stage], 1) for stage in sorted(spent)}


_STAGES = {"inspect": "loading", "score": "scoring", "block": "scoring"}


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
