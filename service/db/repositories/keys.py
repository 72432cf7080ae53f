"""API keys. Rows stay when a key is revoked, so that the audit log can be read."""

from datetime import datetime

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.access import Scope
from service.db.repositories import tenants
from service.db.repositories.rows import record_of
from service.db.tables import KeyRow, now
from service.ids import new_id
from service.records import KeyRecord


def _record(row: KeyRow) -> KeyRecord:
    return record_of(KeyRecord, row, scope=Scope)


def create(
    session: Session,
    *,
    tenant: str,
    name: str,
    scope: Scope,
    prefix: str,
    digest: str,
    expires_at: datetime | None = None,
) -> KeyRecord:
    """A new key; the tenant is made if it is new."""
    tenants.ensure(session, tenant)
    row = KeyRow(
        id=new_id("key"),
        tenant=tenant,
        name=name,
        scope=scope.value,
        prefix=prefix,
        digest=digest,
        expires_at=expires_at,
        revoked_at=None,
    )
    session.add(row)
    session.flush()
    return _record(row)


def find(session: Session, prefix: str) -> KeyRecord | None:
    """The key with this public part, whatever its state, or None."""
    row = session.scalars(select(KeyRow).where(KeyRow.prefix == prefix)).first()
    return None if row is None else _record(row)


def list_all(session: Session, tenant: str | None = None) -> tuple[KeyRecord, ...]:
    """The keys of one tenant or of all, the oldest first."""
    query = select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
    return tuple(
        _record(row)
        for row in session.scalars(query if tenant is None else query.where(KeyRow.tenant == tenant))
    )


def revoke(session: Session, name: str) -> KeyRecord | None:
    """Revoke a key by its id or public part; again changes nothing. None where there is none."""
    row = session.scalars(select(KeyRow).where(or_(KeyRow.id == name, KeyRow.prefix == name))).first()
    if row is None:
        return None
    row.revoked_at = row.revoked_at or now()
    session.flush()
    return _record(row)


def exist(session: Session) -> bool:
    """Whether a key was ever made."""
    return session.scalars(select(KeyRow.id).limit(1)).first() is not None


def usable(session: Session) -> bool:
    """Whether there is a key that is neither revoked nor expired."""
    query = select(KeyRow.id).where(
        KeyRow.revoked_at.is_(None), or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > now())
    )
    return session.scalars(query.limit(1)).first() is not None
