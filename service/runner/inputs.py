"""From the rows of a job's model and calibration set to the spec of the sessions that measure it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensitivity.spec import DataSource, ModelSource, SessionSpec
from service.records import CalibrationRecord, ModelRecord
from service.store.blobs import BlobStore
from service.wire import JobRequest


def model_source(model: ModelRecord, store: BlobStore) -> ModelSource:
    """Where a worker finds the model: the user's factory, a folder of his own, or a view of stored blobs."""
    source = model.source
    if source["kind"] == "factory":
        return ModelSource("factory", source["factory"], model.digest)
    if source["kind"] == "local":
        return ModelSource("folder", source["folder"], model.digest)
    manifest = [(file["path"], file["sha256"]) for file in source["files"]]
    return ModelSource("folder", str(store.materialize(manifest, model.digest)), model.digest)


def data_source(calibration: CalibrationRecord, store: BlobStore) -> DataSource:
    """Where a worker finds the calibration file."""
    file: Mapping[str, Any] = calibration.source["files"][0]
    path: Path = store.path(file["sha256"])
    return DataSource(str(path), calibration.kind, calibration.digest)  # type: ignore[arg-type]


def session_spec(
    request: JobRequest, model: ModelRecord, calibration: CalibrationRecord, store: BlobStore
) -> SessionSpec:
    """What the workers of this job measure."""
    return spec_of(request, model_source(model, store), data_source(calibration, store))


def spec_of(request: JobRequest, model: ModelSource, calibration: DataSource) -> SessionSpec:
    """What workers measure for this request in this model with these data."""
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
    )
