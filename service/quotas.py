"""What a tenant may keep, for whoever adds to it: requests, and runners that fetch for them."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.orm import Session

from service.db.repositories import tenants
from service.errors import InsufficientStorage


def require_room(session: Session, tenant: str, usual: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Raise InsufficientStorage `too-many-bytes` unless the tenant may keep these contents too (digest ->
    bytes); what it has already is not counted again. `usual` are the quotas of the settings.
    """
    most = limit_of(session, tenant, usual, "bytes")
    if not most:
        return
    kept = tenants.blobs_in_use(session, tenant)
    used, new = sum(kept.values()), sum(size for digest, size in sizes.items() if digest not in kept)
    if new and used + new > most:
        raise InsufficientStorage(
            "too-many-bytes",
            f"A tenant must keep at most {most} bytes. Got {new} more, beside {used} in use. Delete models, "
            "calibration sets, checkpoint jobs or open uploads, or ask whoever runs the server for more.",
            extra={"quota": {"name": "bytes", "limit": most, "used": used, "asked": new}},
        )


def limit_of(session: Session, tenant: str, usual: Mapping[str, int], quota: str) -> int:
    """The tenant's limit, with the tenant locked until the transaction ends: two cannot both take what is
    left.
    """
    tenants.ensure(session, tenant)
    return tenants.limits(session, tenant, usual)[quota]
