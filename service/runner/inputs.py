"""The rows that a job is about, and from those of model and calibration set the spec of its sessions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from quant.plan import Plan, plan_from_json
from search.budget import parse_bytes
from sensitivity.spec import DataSource, ModelSource, SessionSpec, UserMetric
from sensitivity.user_code import user_metric
from service.db.repositories import jobs, plans
from service.errors import Conflict, Unprocessable
from service.records import CalibrationRecord, JobRecord, ModelRecord, PlanRecord
from service.runner.context import JobContext, JobFailed
from service.states import InputState
from service.store.blobs import BlobStore
from service.wire import JobRequest, LocalJobRequest


def model_source(model: ModelRecord, store: BlobStore) -> ModelSource:
    """Where a worker finds the model: the user's factory, a folder of his own, or a view of stored blobs."""
    source = model.source
    if source["kind"] == "factory":
        return ModelSource("factory", source["factory"], model.digest)
    if source["kind"] == "local":
        return ModelSource("folder", source["folder"], model.digest)
    manifest = [(file["path"], file["sha256"]) for file in source["files"]]
    return ModelSource("folder", str(store.materialize(manifest, model.digest)), model.digest)


def require_usable(model: ModelRecord | None, ident: str) -> ModelRecord:
    """The model, unless it was rejected or deleted. Raises Conflict with the cause."""
    if model is None or model.state in (InputState.DELETED, InputState.REJECTED):
        cause = dict((model.problem if model else None) or {})
        why = f"rejected: {cause['detail']}" if cause else "deleted."
        raise Conflict(
            "model-not-usable",
            f"The model must be usable. Got {ident}, which was {why} Send a model again.",
            extra={"cause": cause} if cause else {},
        )
    return model


def planned(context: JobContext, session: Session) -> tuple[PlanRecord, Plan, JobRecord]:
    """The plan that the job's request names, its document, and the search that it came from. Raises JobFailed
    where it is gone.
    """
    ident, tenant = str(context.job.request["plan"]), context.job.tenant
    record = plans.get(session, ident, tenant)
    search = None if record is None else jobs.get(session, record.job_id, tenant)
    if record is None or search is None or record.document is None:
        raise JobFailed(
            "plan-not-usable", f"The plan must exist and fit its budget. Got {ident}. Solve again."
        )
    return record, plan_from_json(record.document), search


def data_source(calibration: CalibrationRecord, store: BlobStore) -> DataSource:
    """Where a worker finds the calibration file."""
    file: Mapping[str, Any] = calibration.source["files"][0]
    path: Path = store.path(file["sha256"])
    return DataSource(str(path), calibration.kind, calibration.digest)  # type: ignore[arg-type]


def session_spec(
    request: JobRequest,
    model: ModelRecord,
    calibration: CalibrationRecord,
    store: BlobStore,
    memory_limit: str = "",
) -> SessionSpec:
    """What the workers of this job measure."""
    return spec_of(request, model_source(model, store), data_source(calibration, store), memory_limit)


def spec_of(
    request: JobRequest, model: ModelSource, calibration: DataSource, memory_limit: str = ""
) -> SessionSpec:
    """What workers measure for this request in this model with these data; `memory_limit` is the service's
    own.
    """
    return SessionSpec(
        model=model,
        calibration=calibration,
        task=request.task,
        samples=request.samples,
        sequence_length=request.sequence_length,
        seed=request.seed,
        device=request.device,
        include=request.takes_part,
        exclude=tuple(request.exclude),
        relative_error=request.relative_error,
        max_probes=request.max_probes,
        batch_size=request.batch_size,
        memory_limit=_smaller(request.memory_limit, memory_limit),
        user_metric=_user_metric(request),
    )


def _user_metric(request: JobRequest) -> UserMetric | None:
    """The function that a request of this machine names. Raises Unprocessable where there is none."""
    if not isinstance(request, LocalJobRequest) or request.user_metric is None:
        return None
    try:
        return user_metric(request.user_metric)
    except ValueError as error:
        raise Unprocessable("invalid-request", str(error), pointer="/user_metric") from error


def _smaller(*limits: str | None) -> int | None:
    """The smallest of the limits that are set, in bytes."""
    return min((parse_bytes(limit) for limit in limits if limit), default=None)
