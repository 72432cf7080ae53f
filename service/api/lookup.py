"""Finding what a request names, of its own tenant: another tenant's id is as unknown as a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from service.api.context import Context
from service.db.repositories import calibrations, jobs, models, plans, uploads
from service.errors import Conflict, NotFound, Unprocessable
from service.records import CalibrationRecord, JobRecord, ModelRecord, PlanRecord, UploadRecord
from service.states import InputState


def find_job(context: Context, session: Session, job_id: str) -> JobRecord:
    """The job, or NotFound."""
    job = jobs.get(session, job_id, context.tenant)
    if job is None:
        raise _unknown("job", job_id, "/v1/jobs")
    return job


def find_plan(context: Context, session: Session, plan_id: str) -> PlanRecord:
    """The plan, or NotFound."""
    plan = plans.get(session, plan_id, context.tenant)
    if plan is None:
        raise _unknown("plan", plan_id, "/v1/jobs/{id}/plans")
    return plan


def find_upload(context: Context, session: Session, upload_id: str) -> UploadRecord:
    """The upload, or NotFound."""
    upload = uploads.get(session, upload_id, context.tenant)
    if upload is None:
        raise _unknown("upload", upload_id, "/v1/uploads")
    return upload


def find_model(context: Context, session: Session, model_id: str) -> ModelRecord:
    """The model, or NotFound; a deleted one is still found."""
    model = models.get(session, model_id, context.tenant)
    if model is None:
        raise _unknown("model", model_id, "/v1/models")
    return model


def find_calibration(context: Context, session: Session, calibration_id: str) -> CalibrationRecord:
    """The calibration set, or NotFound; a deleted one is still found."""
    calibration = calibrations.get(session, calibration_id, context.tenant)
    if calibration is None:
        raise _unknown("calibration", calibration_id, "/v1/calibrations")
    return calibration


def usable(kind: str, record: ModelRecord | CalibrationRecord | None, ident: str) -> None:
    """Raise Unprocessable unless a job may use this input (ready, or still being verified)."""
    pointer = f"/{kind}"
    if record is None or record.state == InputState.DELETED:
        raise Unprocessable(
            f"unknown-{kind}",
            f"{kind} must be the id of one of your {kind}s. Got {ident[:80]!r}. Upload it, or list them at "
            f"/v1/{kind}s.",
            pointer=pointer,
        )
    if isinstance(record, ModelRecord) and record.state == InputState.VERIFYING and not record.arrived:
        raise Conflict(
            "model-not-ready",
            f"model must have been fetched from its hub before it is used. Got {ident}, which is on its way. "
            f"Ask again when GET /v1/models/{ident} says ready.",
            pointer=pointer,
            headers={"Retry-After": "5"},
        )
    if record.state == InputState.REJECTED:
        reason = (record.problem or {}).get("detail", "no reason was kept")
        raise Conflict(
            f"{kind}-rejected",
            f"{kind} must have passed verification. Got {ident}, which was rejected: {reason}",
            pointer=pointer,
            extra={"cause": dict(record.problem or {})},
        )


def stored_inventory(model: ModelRecord) -> Mapping[str, Any] | None:
    """The inventory that verification found, as JSON; None until then."""
    found = (model.summary or {}).get("inventory")
    return found if isinstance(found, Mapping) else None


def _unknown(kind: str, ident: str, where: str) -> NotFound:
    return NotFound(f"{kind}-not-found", f"The {kind} must exist. Got {ident[:80]!r}. Find yours at {where}.")
