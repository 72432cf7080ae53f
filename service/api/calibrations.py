"""Calibration sets: one file each, checked when it has arrived."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from sqlalchemy.orm import Session

from service.api.context import After, Ctx, Limit
from service.api.guarded import Guarded
from service.api.idempotency import Answer, IdempotencyKey, once
from service.api.intake import check_uploaded_calibration, store_calibration
from service.api.lookup import find_calibration
from service.api.pages import page_of, position
from service.api.resources import Calibration, Page
from service.api.usage import refuse_in_use
from service.db.repositories import calibrations
from service.errors import NotFound
from service.records import CalibrationRecord
from service.states import InputState
from service.wire import CalibrationRequest

router = APIRouter(prefix="/v1/calibrations", tags=["calibrations"], route_class=Guarded)
CalibrationId = Annotated[str, Path(max_length=100)]


@router.post("", status_code=201, response_model=Calibration)
def create_calibration(body: CalibrationRequest, context: Ctx, key: IdempotencyKey = None) -> Response:
    """Make a calibration set from an upload; the same file gives the same set."""

    checked = check_uploaded_calibration(context, body.upload)

    def create(session: Session) -> Answer:
        return calibration_answer(store_calibration(context, session, checked))

    return once(context, key, "POST /v1/calibrations", body.model_dump(mode="json"), create)


@router.get("")
def list_calibrations(context: Ctx, limit: Limit = 50, cursor: After = None) -> Page[Calibration]:
    """Calibration sets, the newest first, without deleted ones."""
    with context.database.read() as session:
        after = position(context.cursors, "calibrations", cursor)
        rows = calibrations.list_page(session, limit=limit, after=after, tenant=context.tenant)
    return page_of(context.cursors, "calibrations", rows, limit, Calibration.of)


@router.get("/{calibration_id}")
def get_calibration(calibration_id: CalibrationId, context: Ctx) -> Calibration:
    """One calibration set with what its file holds."""
    with context.database.read() as session:
        record = find_calibration(context, session, calibration_id)
    if record.state == InputState.DELETED:
        raise NotFound(
            "calibration-not-found",
            f"The calibration must exist. Got {calibration_id}, which was deleted. Send it again.",
        )
    return Calibration.of(record)


@router.delete("/{calibration_id}", status_code=204)
def delete_calibration(calibration_id: CalibrationId, context: Ctx) -> None:
    """Delete a calibration set that no unfinished job uses."""
    with context.database.write() as session:
        find_calibration(context, session, calibration_id)
        refuse_in_use(context, session, "calibration", calibration_id)
        calibrations.set_state(session, calibration_id, InputState.DELETED)


def calibration_answer(record: CalibrationRecord) -> Answer:
    """201 with where the calibration set is."""
    return Answer(201, Calibration.of(record), {"Location": f"/v1/calibrations/{record.id}"})
