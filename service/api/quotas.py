"""What a tenant may have at once: jobs that wait or run, bytes that are kept, jobs that run.

Requests without a key have no quotas. Jobs beyond `running` are no error: they wait (see `leases.claim`).
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.orm import Session

from service.api.context import Context
from service.db.repositories import tenants
from service.errors import TooMany
from service.quotas import limit_of, require_room

UNKNOWN = ""
"""The digest of a content that is not made yet."""
QUEUE_RETRY_SECONDS = "10"


def require_job(context: Context, session: Session) -> None:
    """Raise TooMany `too-many-jobs` unless the tenant may queue one more job."""
    if context.access.key_id is None:
        return
    most = limit_of(session, context.tenant, context.settings.quotas, "jobs")
    used = tenants.unfinished_jobs(session, context.tenant)
    if most and used >= most:
        raise TooMany(
            "too-many-jobs",
            f"A tenant must have at most {most} jobs that wait or run. Got {used} already. Wait until "
            "some have ended, cancel one, or ask whoever runs the server for a larger quota.",
            extra={"quota": {"name": "jobs", "limit": most, "used": used}},
            headers={"Retry-After": QUEUE_RETRY_SECONDS},
        )


def require_bytes(context: Context, session: Session, sizes: Mapping[str, int]) -> None:
    """Raise InsufficientStorage `too-many-bytes` unless the tenant may keep these contents too (digest ->
    bytes); what it has already is not counted again.
    """
    if context.access.key_id is None:
        return
    require_room(session, context.tenant, context.settings.quotas, sizes)


def usage(context: Context, session: Session) -> dict[str, dict[str, int | None]] | None:
    """Each quota with its limit (null: none) and what is used; None for requests that have no quotas."""
    if context.access.key_id is None:
        return None
    return tenants.usage(session, context.tenant, context.settings.quotas)
