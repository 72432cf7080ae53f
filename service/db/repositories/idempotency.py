"""Idempotency keys: the same key and body give the same answer."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from service.db.repositories.rows import insert_or_keep, record_of
from service.db.tables import IdempotencyKeyRow, now
from service.records import IdempotencyRecord


def begin(
    session: Session, key: str, request_digest: str, *, tenant: str = "default"
) -> IdempotencyRecord | None:
    """None when the key is new: do the work and `finish` in this same transaction.

    Else the answer to repeat; another `request_digest` is misuse of the key. A request that dies before it
    commits leaves nothing, so its key is new again. A concurrent one waits for the first to end.
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
    return record_of(IdempotencyRecord, session.get_one(IdempotencyKeyRow, (tenant, key)))


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
