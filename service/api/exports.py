"""Exports: a plan as the files that a runtime reads. Built here, because writing them needs no torch."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from fastapi import APIRouter, Query, Response
from fastapi import Path as PathParameter
from sqlalchemy.orm import Session

from quant.catalog import EXPORTERS
from quant.export.front import OtherModel, export
from quant.export.protocol import Deployment, ExportError, ExportRefused, ModelFacts
from quant.layers import Inventory
from quant.plan import plan_from_json
from service.api.conditional import IfNoneMatch, matches, not_modified
from service.api.context import Context, Ctx
from service.api.guarded import Guarded
from service.api.lookup import find_job, find_model, find_plan, stored_inventory
from service.api.plans import PlanId
from service.api.resources import items_of
from service.consumers import consumer_fault
from service.db.repositories import jobs
from service.errors import Conflict, NotFound, Unprocessable
from service.records import ModelRecord

router = APIRouter(prefix="/v1", tags=["exports"], route_class=Guarded)
Consumer = Annotated[str, PathParameter(max_length=100)]
OtherModelId = Annotated[
    str | None,
    Query(
        max_length=100, description="Another model of the same shapes, a fine-tune say, to use the plan for."
    ),
]
Forced = Annotated[bool, Query(description="Take weights that the plan was not made for.")]


@router.get("/exports")
def list_consumers() -> dict[str, Any]:
    """The consumers that a plan can be exported to."""
    return items_of(EXPORTERS, "name", "summary", "source")


@router.get(
    "/plans/{plan_id}/exports/{consumer}",
    response_class=Response,
    responses={304: {"description": "Unchanged."}},
)
def get_export(
    plan_id: PlanId,
    consumer: Consumer,
    context: Ctx,
    model: OtherModelId = None,
    force: Forced = False,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A zip archive of the consumer's files and their provenance; the same bytes for the same plan.

    A plan that the consumer cannot run is refused with every violation: layer, rule, and what the plan has.
    """
    fault = consumer_fault(consumer, EXPORTERS)
    if fault:
        raise NotFound("consumer-not-found", fault)
    try:
        content = archive(export(consumer, deployment_of(context, plan_id, model), force=force))
    except ExportRefused as error:
        violations = [asdict(item) for item in error.violations]
        raise Unprocessable("export-refused", str(error), extra={"violations": violations}) from None
    except OtherModel as error:
        raise Conflict("other-model", str(error), pointer="/force") from None
    except ExportError as error:
        raise Conflict("export-impossible", str(error)) from None
    etag = f'"{sha256(content).hexdigest()}"'
    if matches(etag, if_none_match):
        return not_modified(etag)
    headers = {"ETag": etag, "Content-Disposition": f'attachment; filename="bitplan-{consumer}.zip"'}
    return Response(content, headers=headers, media_type="application/zip")


def archive(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed zip archive, sorted by name and without times: equal files give equal bytes.

    >>> archive({"a": b"1", "b": b"2"}) == archive({"b": b"2", "a": b"1"})
    True
    """
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_STORED) as zipped:
        for name in sorted(files):
            zipped.writestr(ZipInfo(name), files[name])
    return buffer.getvalue()


def deployment_of(context: Context, plan_id: str, model_id: str | None = None) -> Deployment:
    """The plan with the modules of its model or of another one, as job or verification stored them."""
    with context.database.read() as session:
        record = find_plan(context, session, plan_id)
        if record.document is None:
            raise Conflict(
                "plan-has-no-document",
                f"A plan must fit its budget to be exported. Got {record.status}. Solve for a larger budget "
                "first.",
            )
        facts = _model_facts(context, session, record.job_id, model_id)
    return Deployment(plan_from_json(record.document), facts)


def _model_facts(context: Context, session: Session, job_id: str, model_id: str | None) -> ModelFacts:
    """Of the job's model, or of another one that a plan of it is to be used for."""
    job = find_job(context, session, job_id)
    if model_id is not None:
        return _other_facts(context, find_model(context, session, model_id))
    model = find_model(context, session, str(job.request["model"]))
    inventory = jobs.inventory(session, job.id) or stored_inventory(model)
    if inventory is None:
        raise Conflict(
            "job-not-finished",
            f"A job must be finished to export its plans. Got a {job.state} job. Ask when it has ended.",
            headers={"Retry-After": "2"},
        )
    return ModelFacts.of(Inventory.from_json(inventory), _config(context, model))


def _other_facts(context: Context, model: ModelRecord) -> ModelFacts:
    inventory = stored_inventory(model)
    if inventory is None or model.digest is None:
        raise Conflict(
            "model-not-verified",
            f"A model must be verified to use a plan for it. Got a {model.state} one. Ask when it is ready.",
            pointer="/model",
        )
    facts = ModelFacts.of(Inventory.from_json(inventory), _config(context, model))
    return replace(facts, digest=model.digest)


def _config(context: Context, model: ModelRecord) -> dict[str, Any]:
    """The model's `config.json`."""
    path = _config_path(context, model)
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise Conflict(
            "model-without-config",
            f"The model's config.json must still be there. Got none that can be read for {model.id}. "
            "Send the model again.",
        ) from None
    return config


def _config_path(context: Context, model: ModelRecord) -> Path:
    if model.source["kind"] == "local":
        return Path(model.source["folder"]) / "config.json"
    files = {file["path"]: file["sha256"] for file in model.source.get("files", ())}
    if "config.json" not in files:
        raise Conflict(
            "model-without-config",
            f"A model must come with config.json to be exported. Got a {model.source['kind']} model. "
            "Plan for a Hugging Face folder.",
        )
    return context.store.path(files["config.json"])
