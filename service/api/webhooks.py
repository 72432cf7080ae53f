"""Webhooks of jobs: attached when a job is made, and how far their delivery has come."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import Field
from sqlalchemy.orm import Session

from service.api.context import Context, Ctx
from service.api.guarded import Guarded
from service.api.lookup import find_job
from service.api.resources import Resource
from service.db.repositories import webhooks
from service.errors import NotFound, Unprocessable
from service.records import JobRecord, WebhookRecord
from service.webhooks.guard import DestinationRefused, Guard, parse_destination
from service.wire import Webhook

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=Guarded)


class Delivery(Resource):
    """How far a webhook has come."""

    id: str = Field(description="The webhook-id of the message, the same at each attempt.")
    url: str
    state: str = Field(description="waiting (for the job's end), pending, delivered, failed (given up)")
    attempts: int
    next_attempt_at: datetime | None
    last_status: int | None = Field(description="HTTP status of the receiver's last answer.")
    last_error: str | None = Field(description="Why the last attempt failed.")
    settled_at: datetime | None = Field(description="When it was delivered or given up.")

    @classmethod
    def of(cls, record: WebhookRecord) -> Delivery:
        """From the record, without the secret."""
        due = record.next_attempt_at
        return cls(
            id=record.id,
            url=record.url,
            state=record.state,
            attempts=record.attempts,
            next_attempt_at=None if due is None else datetime.fromtimestamp(due, UTC),
            last_status=record.last_status,
            last_error=record.last_error,
            settled_at=record.settled_at,
        )


@router.get("/{job_id}/webhook")
def get_webhook(job_id: Annotated[str, Path(max_length=100)], context: Ctx) -> Delivery:
    """How far the delivery of the job's webhook has come."""
    with context.database.read() as session:
        find_job(context, session, job_id)
        found = webhooks.of_job(session, job_id)
    if found is None:
        raise NotFound(
            "webhook-not-found",
            f"The job must have been submitted with a webhook. Got {job_id}, which has none. Submit one.",
        )
    return Delivery.of(found)


def attach(context: Context, session: Session, job: JobRecord, webhook: Webhook | None) -> None:
    """Have a new job tell of its end. Raises Unprocessable for a receiver that could never be told."""
    if webhook is None:
        return
    try:
        Guard.of(context.settings.webhook_networks).check(parse_destination(webhook.url))
    except DestinationRefused as refused:
        raise Unprocessable("webhook-refused", str(refused), pointer="/webhook/url") from None
    webhooks.create(session, job.id, webhook.url, webhook.secret.get_secret_value())


def identity_of(webhook: Webhook | None) -> dict[str, Any]:
    """What makes a request with another webhook another request; only ever digested."""
    if webhook is None:
        return {}
    return {"webhook": {"url": webhook.url, "secret": webhook.secret.get_secret_value()}}
