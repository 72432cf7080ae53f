"""What the API and the runner both know of checkpoint jobs. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from quant.catalog import CHECKPOINTS
from quant.digest import digest
from quant.plan import Plan
from service.db.repositories import calibrations, models
from service.errors import Conflict
from service.records import CalibrationRecord, JobRecord, ModelRecord, PlanRecord
from service.states import InputState

PLAN, PROGRESS, RESULT = "plan.json", "progress", "result"
"""Files of the folder that a runner shares with the worker that writes a checkpoint."""


def file_name(consumer: str) -> str:
    """The name that a download is offered under.

    >>> file_name("vllm")
    'bitplan-vllm.tar'
    """
    return f"bitplan-{consumer}.{'tar' if CHECKPOINTS[consumer].writes == 'folder' else consumer}"


def request_of(plan: PlanRecord, consumer: str, *, force: bool) -> tuple[dict[str, Any], str]:
    """The request of a checkpoint job, and its digest, by which the job is found again."""
    request = {"plan": plan.id, "job": plan.job_id, "consumer": consumer, "force": force}
    return request, digest(["checkpoint", request])


def require_model(session: Session, search: JobRecord, tenant: str) -> ModelRecord:
    """The model that a search planned for. Raises Conflict when it was deleted."""
    ident = str(search.request["model"])
    model = models.get(session, ident, tenant)
    if model is None or model.state == InputState.DELETED:
        raise Conflict(
            "model-deleted",
            f"The plan's model must still be there. Got {ident}, which was deleted. Send it and plan again.",
        )
    return model


def require_calibration(session: Session, plan: Plan, tenant: str) -> CalibrationRecord | None:
    """The plan's calibration data, found by their digest; None where nothing needs them.

    Raises Conflict when they are needed and were deleted.
    """
    if not plan.reads_calibration:
        return None
    found = calibrations.find_by_digest(session, plan.digests.calibration or "", tenant)
    if found is None or found.state != InputState.READY:
        why = f"it has the corrections {', '.join(plan.corrections or ())}"
        if plan.needs_calibration:
            layer = plan.needs_calibration[0]
            why = f"{layer} is {plan.layers[layer].scheme}"
        raise Conflict(
            "calibration-deleted",
            f"The plan's calibration data must still be there, because {why}."
            f" Got none with the digest {plan.digests.calibration}."
            " Send the same file again.",
        )
    return found


def read_progress(folder: Path) -> tuple[int, int] | None:
    """(layers written, layers in all), or None before the first."""
    try:
        done, total = (folder / PROGRESS).read_text(encoding="utf-8").split()
        return int(done), int(total)
    except (OSError, ValueError):
        return None
