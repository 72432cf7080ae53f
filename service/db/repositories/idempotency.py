"""Idempotency keys: the same key and body give the same answer."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session

from service.db.repositories.rows import insert_or_keep, record_of
from service.db.tables import IdempotencyKeyRow, now
from service.records import IdempotencyRecord


def begin(
    session: Session, key: str, request_digest: str, *, tenant: str = "default", stale_seconds: float = 60.0
) -> IdempotencyRecord | None:
    """None when the key is new (or its first request died over `stale_seconds` ago): do the work, then
    `finish`.

    Else what is remembered: another `request_digest` is misuse of the key, `status` None means that the
    first request is still being answered, and anything else is the answer to repeat.
    """
    values = {
        "tenant": tenant,
        "key": key,
        "request_digest": request_digest,
        "headers": {},
        "created_at": now(),
    }
    if insert_or_keep(session, IdempotencyKeyRow, values):
        return None
    row = session.get_one(IdempotencyKeyRow, (tenant, key), with_for_update=True)
    abandoned = row.status is None and now() - row.created_at > timedelta(seconds=stale_seconds)
    if abandoned and row.request_digest == request_digest:
        row.created_at = now()
        session.flush()
        return None
    return record_of(IdempotencyRecord, row)


def finish(
    session: Session,
    key: str,
    *,
    status: int,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
    tenant: str = "default",
) -> IdempotencyRecord:
    """Remember the answer to a key that `begin` gave to this request."""
    row = session.get_one(IdempotencyKeyRow, (tenant, key), with_for_update=True)
    row.status, row.body, row.headers = status, dict(body), dict(headers or {})
    session.flush()
    return record_of(IdempotencyRecord, row)


def forget(session: Session, key: str, *, tenant: str = "default") -> None:
    """Give up a key whose request failed before it changed anything."""
    row = session.get(IdempotencyKeyRow, (tenant, key))
    if row is not None and row.status is None:
        session.delete(row)
