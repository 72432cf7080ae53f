"""The handler of jobs that make calibration data from a model alone, batch by batch, each stored at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy.orm import Session

from quant.digest import digest
from sensitivity.calibration_check import check_calibration
from sensitivity.catalog import DATA_FREE
from sensitivity.spec import NO_DATA, SessionSpec
from service.db.repositories import calibrations, models, uploads
from service.made_calibration import KIND, SESSION, Arrays, require_size, units_of, write_samples
from service.records import CalibrationRecord
from service.runner.context import JobContext
from service.runner.dispatch import run_units, stored_result
from service.runner.folders import own_folder
from service.runner.inputs import model_source, require_usable
from service.states import InputState, Stage
from service.wire import MakeCalibrationRequest


def run_making(context: JobContext) -> Mapping[str, Any]:
    """Make the data; the summary names the calibration set."""
    asked = dict(context.job.request)
    model_id = str(asked.pop("model"))
    request = MakeCalibrationRequest.model_validate(asked)
    most = context.settings.max_upload_bytes
    require_size(request, most)
    parts = _parts(context, model_id, request)
    with own_folder(context, "calibration") as folder:
        file = folder / f"{request.method}.safetensors"
        write_samples(parts, request.samples, file, most)
        summary, size = check_calibration(file, KIND), file.stat().st_size
        sha256 = context.store.adopt(file, context.check)
    source = {
        "kind": "made",
        "model": model_id,
        **request.model_dump(mode="json"),
        "files": [{"path": f"{request.method}.safetensors", "size": size, "sha256": sha256}],
    }
    made = context.write(lambda session: _store(context, session, source, sha256, size, summary))
    return {"model": model_id, "calibration": made.id, "method": request.method, "samples": request.samples}


def _parts(context: JobContext, model_id: str, request: MakeCalibrationRequest) -> Iterator[Arrays]:
    """The arrays of every unit, made first where they are not stored, each read when it is asked for."""
    found = context.read(lambda session: models.get(session, model_id, context.job.tenant))
    model = require_usable(found, model_id)
    spec = SessionSpec(model=model_source(model, context.store), calibration=NO_DATA)
    units, version = units_of(request), DATA_FREE[request.method].version
    settings = {
        "tenant": context.job.tenant,
        **spec.score_settings(),
        "made": request.method,
        "version": version,
    }
    score_set = digest(settings)
    context.open_score_set(score_set, settings)
    executor = context.executor(spec, SESSION)
    try:
        run_units(context, executor, score_set, units, Stage.GENERATING)
    finally:
        executor.close(0)
    results = (stored_result(context, score_set, unit.key) for unit in units)
    return (result.arrays for result in results if result is not None)


def _store(
    context: JobContext, session: Session, source: Mapping[str, Any], sha256: str, size: int, summary: Any
) -> CalibrationRecord:
    """The calibration set of this file: the one that is there, or a new one."""
    tenant = context.job.tenant
    uploads.record_blob(session, sha256, size, tenant)
    known = calibrations.find_by_digest(session, sha256, tenant)
    if known is not None and known.kind == KIND:
        return known
    return calibrations.create(
        session,
        source=source,
        digest=sha256,
        kind=KIND,
        state=InputState.READY,
        summary=summary,
        tenant=tenant,
    )
