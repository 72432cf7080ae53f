"""Calibration sets that were sent."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.repositories.rows import page, record_of
from service.db.tables import CalibrationRow
from service.ids import new_id
from service.records import CalibrationRecord, Cursor
from service.states import InputState


def _record(row: CalibrationRow) -> CalibrationRecord:
    return record_of(CalibrationRecord, row, state=InputState)


def create(
    session: Session,
    *,
    source: Mapping[str, Any],
    digest: str,
    kind: str,
    state: InputState = InputState.VERIFYING,
    summary: Mapping[str, Any] | None = None,
    tenant: str = "default",
) -> CalibrationRecord:
    """A new calibration set, which must be verified before jobs may use it."""
    row = CalibrationRow(
        id=new_id("cal"),
        tenant=tenant,
        source=dict(source),
        digest=digest,
        kind=kind,
        state=state.value,
        problem=None,
        summary=None if summary is None else dict(summary),
    )
    session.add(row)
    session.flush()
    return _record(row)


def get(session: Session, ident: str, tenant: str = "default") -> CalibrationRecord | None:
    """The tenant's calibration set, or None."""
    row = session.get(CalibrationRow, ident)
    return _record(row) if row is not None and row.tenant == tenant else None


def list_page(
    session: Session, *, limit: int = 50, after: Cursor | None = None, tenant: str = "default"
) -> tuple[CalibrationRecord, ...]:
    """A page, the newest first, without deleted ones."""
    rows = page(
        session, CalibrationRow, tenant, limit, after, CalibrationRow.state != InputState.DELETED.value
    )
    return tuple(_record(row) for row in rows)


def find_by_digest(session: Session, digest: str, tenant: str = "default") -> CalibrationRecord | None:
    """The tenant's oldest ready or verifying calibration set with this content, or None."""
    usable = (InputState.READY.value, InputState.VERIFYING.value)
    query = select(CalibrationRow).where(
        CalibrationRow.tenant == tenant, CalibrationRow.digest == digest, CalibrationRow.state.in_(usable)
    )
    row = session.scalars(query.order_by(CalibrationRow.created_at, CalibrationRow.id).limit(1)).first()
    return None if row is None else _record(row)


def set_state(
    session: Session,
    ident: str,
    state: InputState,
    *,
    problem: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> CalibrationRecord:
    """Write what verification found; a deleted one stays deleted. Raises LookupError when there is none."""
    row = session.get(CalibrationRow, ident, with_for_update=True)
    if row is None:
        raise LookupError(f"Calibration set must exist. Got {ident}.")
    if row.state != InputState.DELETED.value:
        row.state = state.value
        row.problem = None if problem is None else dict(problem)
        row.summary = row.summary if summary is None else dict(summary)
    session.flush()
    return _record(row)
