"""What a tenant may have at once: jobs that wait or run, bytes that are kept, jobs that run.

Requests without a key have no quotas. Jobs beyond `running` are no error: they wait (see `leases.claim`).
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.orm import Session

from service.api.context import Context
from service.db.repositories import tenants
from service.errors import InsufficientStorage, TooMany

UNKNOWN = ""
"""The digest of a content that is not made yet."""
QUEUE_RETRY_SECONDS = "10"


def require_job(context: Context, session: Session) -> None:
    """Raise TooMany `too-many-jobs` unless the tenant may queue one more job."""
    if context.access.key_id is None:
        return
    most = _limit(context, session, "jobs")
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
    most = _limit(context, session, "bytes")
    if not most:
        return
    kept = tenants.blobs_in_use(session, context.tenant)
    used, new = sum(kept.values()), sum(size for digest, size in sizes.items() if digest not in kept)
    if new and used + new > most:
        raise InsufficientStorage(
            "too-many-bytes",
            f"A tenant must keep at most {most} bytes. Got {new} more, beside {used} in use. Delete models, "
            "calibration sets, checkpoint jobs or open uploads, or ask whoever runs the server for more.",
            extra={"quota": {"name": "bytes", "limit": most, "used": used, "asked": new}},
        )


def usage(context: Context, session: Session) -> dict[str, dict[str, int | None]] | None:
    """Each quota with its limit (null: none) and what is used; None for requests that have no quotas."""
    if context.access.key_id is None:
        return None
    return tenants.usage(session, context.tenant, context.settings.quotas)


def _limit(context: Context, session: Session, quota: str) -> int:
    """The tenant's limit, with the tenant locked until the transaction ends: two requests cannot both take
    what is left.
    """
    tenants.ensure(session, context.tenant)
    return tenants.limits(session, context.tenant, context.settings.quotas)[quota]
