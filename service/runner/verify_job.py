"""The handler of verifications: a worker builds the model, and says what of it can be quantized or what is
wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from sensitivity.spec import NO_DATA, SessionSpec
from sensitivity.units import InspectUnit
from service.db.repositories import models
from service.errors import ServiceError
from service.executors.protocol import ExecutorAway
from service.passing import passing
from service.records import ModelRecord
from service.runner.context import JobContext
from service.runner.dispatch import run_alone
from service.runner.hub_model import arrived, drop_pieces, forget
from service.runner.inputs import model_source
from service.runner.problems import JobFailed, problem_of, problem_of_failure
from service.states import InputState

MODEL_CHECK = "sensitivity.model_check:ModelCheck"


def run_verification(context: JobContext) -> Mapping[str, Any]:
    """Build the model once: it becomes ready with its inventory, or rejected with the reason. What passes by
    itself (the database, the disk, the executor is away) leaves it to the next runner.
    """
    model_id = str(context.job.request["model"])
    with context.database.read() as session:
        model = models.get(session, model_id, context.job.tenant)
    if model is None or model.state != InputState.VERIFYING:
        return {"model": model_id, "state": "gone" if model is None else str(model.state)}
    try:
        return _verified(context, _arrived(context, model))
    except (ServiceError, ExecutorAway):
        raise
    except Exception as error:
        if not passing(error):
            _reject(context, model, JobFailed("internal-error", str(problem_of(error)["detail"])))
        raise


def _verified(context: JobContext, model: ModelRecord) -> Mapping[str, Any]:
    spec = SessionSpec(model=model_source(model, context.store), calibration=NO_DATA)
    outcome = run_alone(context, spec, InspectUnit(), session_factory=MODEL_CHECK)
    if outcome.failure is not None:
        rejected = problem_of_failure(outcome.failure, {})
        _reject(context, model, rejected)
        raise rejected
    assert outcome.result is not None
    summary = {**(model.summary or {}), **outcome.result.facts}
    context.write(lambda session: models.set_state(session, model.id, InputState.READY, summary=summary))
    return {"model": model.id, "state": str(InputState.READY)}


def _arrived(context: JobContext, model: ModelRecord) -> ModelRecord:
    """The model with its files; one of a hub is fetched, or rejected with the reason."""
    try:
        return arrived(context, model)
    except ServiceError as rejected:
        _reject(context, model, rejected)
        if not model.arrived and rejected.status < 500:
            drop_pieces(context, model)
        raise


def _reject(context: JobContext, model: ModelRecord, why: ServiceError) -> None:
    problem = why.as_json()

    def change(session: Session) -> None:
        if not model.arrived:
            forget(session, model)
        models.set_state(session, model.id, InputState.REJECTED, problem=problem)

    context.write(change)
