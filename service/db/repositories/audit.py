"""The audit log: who wrote what, and how it ended."""

from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from service.access import Access
from service.db.repositories.rows import page, record_of
from service.db.tables import AuditRow
from service.ids import new_id
from service.records import AuditRecord, Cursor

LONGEST_PATH = 300


def begin(
    session: Session,
    access: Access,
    *,
    action: str,
    method: str,
    path: str,
    peer: str | None,
    request_id: str,
    status: int | None = None,
) -> str:
    """A row for a write that is about to happen, or, with `status`, that was refused. Gives its id."""
    row = AuditRow(
        id=new_id("audit"),
        tenant=access.tenant,
        key_id=access.key_id,
        peer=peer,
        action=action,
        method=method,
        path=path[:LONGEST_PATH],
        request_id=request_id,
        status=status,
    )
    session.add(row)
    session.flush()
    return row.id


def finish(session: Session, ident: str, status: int) -> None:
    """Say how a write was answered."""
    session.get_one(AuditRow, ident).status = status


def count_before(session: Session, before: datetime) -> int:
    """How many writes of all tenants are older."""
    query = select(func.count()).select_from(AuditRow).where(AuditRow.created_at < before)
    return int(session.scalar(query) or 0)


def delete_before(session: Session, before: datetime, most: int) -> int:
    """Delete at most so many of them; how many there were."""
    old = select(AuditRow.id).where(AuditRow.created_at < before).order_by(AuditRow.id).limit(most)
    idents = list(session.scalars(old))
    session.execute(delete(AuditRow).where(AuditRow.id.in_(idents)))
    return len(idents)


def list_page(
    session: Session, *, tenant: str, limit: int = 50, after: Cursor | None = None
) -> tuple[AuditRecord, ...]:
    """A page of a tenant's writes, the newest first."""
    return tuple(record_of(AuditRecord, row) for row in page(session, AuditRow, tenant, limit, after))


def newest(session: Session, limit: int, tenant: str | None = None) -> tuple[AuditRecord, ...]:
    """The newest writes of one tenant or of all."""
    query = select(AuditRow).order_by(AuditRow.created_at.desc(), AuditRow.id.desc()).limit(limit)
    query = query if tenant is None else query.where(AuditRow.tenant == tenant)
    return tuple(record_of(AuditRecord, row) for row in session.scalars(query))
