"""The audit log of the key's own tenant."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter, Response
from pydantic import Field

from service.api.context import After, Ctx, Limit
from service.api.guarded import Guarded
from service.api.pages import page_of, position
from service.api.resources import Page, Resource
from service.db.repositories import audit
from service.records import AuditRecord

router = APIRouter(prefix="/v1/audit", tags=["access"], route_class=Guarded)


class Write(Resource):
    """One write: who, what, when, and how it was answered."""

    id: str
    key: str | None = Field(description="Id of the key; null where none was asked for.")
    peer: str | None = Field(description="The address that the request came from.")
    action: str = Field(description="The operation's name in the OpenAPI document.")
    method: str
    path: str
    request_id: str = Field(description="X-Request-ID of the answer.")
    status: int | None = Field(description="HTTP status; null while it runs, or where the server died.")
    created_at: datetime

    @classmethod
    def of(cls, record: AuditRecord) -> Write:
        """From the record."""
        return cls(
            id=record.id,
            key=record.key_id,
            peer=record.peer,
            action=record.action,
            method=record.method,
            path=record.path,
            request_id=record.request_id,
            status=record.status,
            created_at=record.created_at,
        )


@router.get("")
def list_audit(context: Ctx, response: Response, limit: Limit = 50, cursor: After = None) -> Page[Write]:
    """Writes of your tenant's keys, the newest first."""
    with context.database.read() as session:
        after = position(context.cursors, "audit", cursor)
        rows = audit.list_page(session, tenant=context.tenant, limit=limit, after=after)
    response.headers["Cache-Control"] = "no-store"
    return page_of(context.cursors, "audit", rows, limit, Write.of)
