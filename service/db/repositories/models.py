"""Models that were sent."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.repositories.rows import page, record_of
from service.db.tables import ModelRow
from service.ids import new_id
from service.records import Cursor, ModelRecord
from service.states import InputState


def _record(row: ModelRow) -> ModelRecord:
    return record_of(ModelRecord, row, state=InputState)


def create(
    session: Session,
    *,
    source: Mapping[str, Any],
    digest: str,
    state: InputState = InputState.VERIFYING,
    summary: Mapping[str, Any] | None = None,
    tenant: str = "default",
) -> ModelRecord:
    """A new model, which must be verified before jobs may use it."""
    row = ModelRow(
        id=new_id("model"),
        tenant=tenant,
        source=dict(source),
        digest=digest,
        state=state.value,
        problem=None,
        summary=None if summary is None else dict(summary),
    )
    session.add(row)
    session.flush()
    return _record(row)


def get(session: Session, ident: str, tenant: str = "default") -> ModelRecord | None:
    """The tenant's model, or None."""
    row = session.get(ModelRow, ident)
    return _record(row) if row is not None and row.tenant == tenant else None


def list_page(
    session: Session, *, limit: int = 50, after: Cursor | None = None, tenant: str = "default"
) -> tuple[ModelRecord, ...]:
    """A page, the newest first, without deleted ones."""
    rows = page(session, ModelRow, tenant, limit, after, ModelRow.state != InputState.DELETED.value)
    return tuple(_record(row) for row in rows)


def find_by_digest(session: Session, digest: str, tenant: str = "default") -> ModelRecord | None:
    """The tenant's oldest ready or verifying model with this content, or None."""
    usable = (InputState.READY.value, InputState.VERIFYING.value)
    query = select(ModelRow).where(
        ModelRow.tenant == tenant, ModelRow.digest == digest, ModelRow.state.in_(usable)
    )
    row = session.scalars(query.order_by(ModelRow.created_at, ModelRow.id).limit(1)).first()
    return None if row is None else _record(row)


def list_by_digest(session: Session, digest: str, tenant: str = "default") -> tuple[ModelRecord, ...]:
    """The tenant's ready models with this content, the oldest first."""
    query = select(ModelRow).where(
        ModelRow.tenant == tenant, ModelRow.digest == digest, ModelRow.state == InputState.READY.value
    )
    return tuple(_record(row) for row in session.scalars(query.order_by(ModelRow.created_at, ModelRow.id)))


def find_by_source(
    session: Session, kind: str, members: Mapping[str, str], tenant: str = "default"
) -> ModelRecord | None:
    """The tenant's oldest ready model of this kind whose source has these members, else the oldest verifying
    one, else None.
    """
    usable = (InputState.READY.value, InputState.VERIFYING.value)
    query = select(ModelRow).where(ModelRow.tenant == tenant, ModelRow.state.in_(usable))
    for name, value in {"kind": kind, **members}.items():
        query = query.where(ModelRow.source[name].as_string() == value)
    later = ModelRow.state != InputState.READY.value
    row = session.scalars(query.order_by(later, ModelRow.created_at, ModelRow.id).limit(1)).first()
    return None if row is None else _record(row)


def set_source(session: Session, ident: str, source: Mapping[str, Any]) -> ModelRecord:
    """Write which files a model will have. Raises LookupError when there is none."""
    row = _locked(session, ident)
    row.source = dict(source)
    session.flush()
    return _record(row)


def set_arrived(session: Session, ident: str, digest: str, summary: Mapping[str, Any]) -> ModelRecord:
    """Write that all files of a model are there, and what they say. Raises LookupError when there is none."""
    row = _locked(session, ident)
    row.digest, row.summary = digest, dict(summary)
    session.flush()
    return _record(row)


def set_state(
    session: Session,
    ident: str,
    state: InputState,
    *,
    problem: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> ModelRecord:
    """Write what verification found; a deleted one stays deleted. Raises LookupError when there is none."""
    row = _locked(session, ident)
    if row.state != InputState.DELETED.value:
        row.state = state.value
        row.problem = None if problem is None else dict(problem)
        row.summary = row.summary if summary is None else dict(summary)
    session.flush()
    return _record(row)


def _locked(session: Session, ident: str) -> ModelRow:
    row = session.get(ModelRow, ident, with_for_update=True)
    if row is None:
        raise LookupError(f"Model must exist. Got {ident}.")
    return row
