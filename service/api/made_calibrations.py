"""Calibration data made from a model alone: a job makes them, and its summary names the calibration set."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

from quant.digest import digest
from sensitivity.catalog import DATA_FREE
from service.api.context import Context, Ctx
from service.api.guarded import Guarded
from service.api.idempotency import Answer, IdempotencyKey, once
from service.api.job_resources import Job
from service.api.jobs import accepted, queued_once
from service.api.lookup import find_model, usable
from service.api.models import ModelId
from service.api.resources import items_of
from service.db.repositories import calibrations
from service.made_calibration import least_size, require_size
from service.records import JobRecord
from service.states import InputState, JobKind
from service.wire import MakeCalibrationRequest

router = APIRouter(prefix="/v1", tags=["calibrations"], route_class=Guarded)


@router.get("/calibration-methods")
def list_methods() -> dict[str, Any]:
    """Ways to make calibration data from a model alone."""
    return items_of(DATA_FREE, "name", "makes", "summary", "source")


@router.post("/models/{model_id}/calibrations", status_code=202, response_model=Job)
def make_calibration(
    model_id: ModelId, body: MakeCalibrationRequest, context: Ctx, key: IdempotencyKey = None
) -> Response:
    """Queue a job that makes calibration data from the model; its summary names the calibration set.

    Asking twice is one job.
    """
    require_size(body, context.settings.max_upload_bytes)
    request = {"model": model_id, **body.model_dump(mode="json")}

    def create(session: Session) -> Answer:
        usable("model", find_model(context, session, model_id), model_id)
        content = digest(["calibration", request])
        job = queued_once(
            context,
            session,
            JobKind.MAKE_CALIBRATION,
            request,
            content,
            lambda job: _is_there(context, session, job),
            size=least_size(body),
        )
        return accepted(job)

    return once(context, key, f"POST /v1/models/{model_id}/calibrations", request, create)


def _is_there(context: Context, session: Session, job: JobRecord) -> bool:
    made = calibrations.get(session, str((job.summary or {}).get("calibration")), context.tenant)
    return made is not None and made.state == InputState.READY
