"""The handler of checkpoint jobs: a worker writes the files, the runner puts them into the store as one blob.

Everything before the blob lies in a folder of this claim alone. A job that is claimed again begins with an
empty folder; the blob appears whole or not at all, and the job's summary is what makes it known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from quant.digest import canonical_json
from quant.plan import Plan
from sensitivity.spec import NO_DATA, SessionSpec
from sensitivity.units import WriteUnit
from service.checkpoints import PLAN, RESULT, file_name, read_progress, require_calibration, require_model
from service.errors import InsufficientStorage
from service.executors.protocol import Outcome
from service.failpoints import failpoint
from service.records import CalibrationRecord, ModelRecord
from service.runner.context import JobContext
from service.runner.dispatch import run_alone
from service.runner.folders import own_folder
from service.runner.inputs import data_source, model_source, planned
from service.runner.problems import problem_of_failure
from service.states import Stage

WRITER = "service.checkpoint_writer:CheckpointWriter"


def run_checkpoint(context: JobContext) -> Mapping[str, Any]:
    """Write the checkpoint of the plan that the job names; the summary says which blob it is."""
    request = context.job.request
    consumer = str(request["consumer"])
    plan, model, calibration = context.read(lambda session: _inputs(context, session))
    spec = _spec(context, plan, model, calibration)
    with own_folder(context, "checkpoint") as folder:
        (folder / PLAN).write_text(canonical_json(plan.as_json()), encoding="utf-8")
        context.report_progress(Stage.PACKAGING, 0, len(plan.layers))
        outcome = run_alone(
            context,
            spec,
            WriteUnit(consumer, str(folder), bool(request["force"])),
            session_factory=WRITER,
            workers=1,
            meanwhile=lambda: _report(context, folder),
            writable=(folder,),
        )
        facts = _facts(outcome)
        context.report_progress(Stage.PACKAGING, len(plan.layers), len(plan.layers))
        digest = context.store.adopt(folder / RESULT, context.check)
    failpoint("runner.checkpoint_stored")
    stored = {"sha256": digest, "bytes": facts["bytes"], "file": file_name(consumer)}
    context.event("checkpoint", stored)
    about = {"plan": request["plan"], "consumer": consumer}
    return {**about, **stored, "layout": facts["layout"], "provenance": facts["provenance"]}


def _inputs(context: JobContext, session: Session) -> tuple[Plan, ModelRecord, CalibrationRecord | None]:
    _, plan, search = planned(context, session)
    model = require_model(session, search, context.job.tenant)
    return plan, model, require_calibration(session, plan, context.job.tenant)


def _spec(
    context: JobContext, plan: Plan, model: ModelRecord, calibration: CalibrationRecord | None
) -> SessionSpec:
    source = model_source(model, context.store)
    if calibration is None or plan.calibration is None:
        return SessionSpec(model=source, calibration=NO_DATA)
    data = data_source(calibration, context.store)
    return SessionSpec(model=source, calibration=data, include=tuple(plan.layers), **asdict(plan.calibration))


def _report(context: JobContext, folder: Path) -> None:
    progress = read_progress(folder)
    if progress is not None:
        context.report_progress(Stage.PACKAGING, *progress)


def _facts(outcome: Outcome) -> Mapping[str, Any]:
    if outcome.result is not None:
        return outcome.result.facts
    assert outcome.failure is not None
    if outcome.failure.detail.get("error") == "disk_full":
        raise InsufficientStorage("disk-full", outcome.failure.message)
    raise problem_of_failure(outcome.failure, {})
