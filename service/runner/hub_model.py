"""Fetching a model of a hub: the first part of its verification, which any runner goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from quant.digest import manifest_digest
from service.db.repositories import models, retention, uploads
from service.failpoints import failpoint
from service.hub.connection import HubConnection
from service.hub.fetching import Patience, announced, fetch, partial_id
from service.hub.place import place_of, require_offered
from service.hub.reference import HubReference
from service.ingest.model_folder import check_model
from service.quotas import require_room
from service.records import ModelRecord
from service.runner.context import JobContext
from service.states import Stage


def arrived(context: JobContext, model: ModelRecord) -> ModelRecord:
    """The model, with its files in the store and checked. Raises ServiceError."""
    if model.arrived:
        return model
    require_offered(context.settings)
    reference = reference_of(model)
    patience = Patience(context.wait, context.settings.hub_hours * 3600)
    with HubConnection(place_of(context.settings), context.check) as connection:
        if "files" not in model.source:
            model = _announce(context, model, reference, connection, patience)
        files = [dict(file) for file in model.source["files"]]
        fetch(connection, context.store, reference, files, patience, lambda *far: _tell(context, *far))
    facts = check_model({file["path"]: context.store.path(file["sha256"]) for file in files})
    failpoint("runner.hub_arrived")
    return context.write(lambda session: _keep(context, session, model, facts.as_json()))


def forget(session: Session, model: ModelRecord) -> None:
    """The model has no files, since they will not come."""
    models.set_source(session, model.id, {**model.source, "files": []})


def drop_pieces(context: JobContext, model: ModelRecord) -> None:
    """Drop what has come of files that no other attempt may go on with."""
    context.store.drop_partials(partial_id(reference_of(model)))


def reference_of(model: ModelRecord) -> HubReference:
    """What a model of a hub was asked for as."""
    assert model.origin is not None
    return HubReference(**model.origin)


def _announce(
    context: JobContext,
    model: ModelRecord,
    reference: HubReference,
    connection: HubConnection,
    patience: Patience,
) -> ModelRecord:
    """List the files and store the small ones; from now on the model has all of them, so nothing collects
    them and the tenant's quota counts them.
    """
    found = announced(connection, context.store, reference, context.settings.max_upload_bytes, patience)
    failpoint("runner.hub_announced")
    source = {**model.source, "files": list(found.files), "left_out": list(found.left_out)}

    def change(session: Session) -> ModelRecord:
        retention.share(session)
        if context.job.request.get("quota"):
            sizes = {file["sha256"]: file["size"] for file in found.files}
            require_room(session, context.job.tenant, context.settings.quotas, sizes)
        return models.set_source(session, model.id, source)

    return context.write(change)


def _keep(context: JobContext, session: Session, model: ModelRecord, facts: Mapping[str, Any]) -> ModelRecord:
    for file in model.source["files"]:
        uploads.record_blob(session, file["sha256"], file["size"], context.job.tenant)
    return models.set_arrived(session, model.id, manifest_digest(model.source["files"]), facts)


def _tell(context: JobContext, done: int, total: int) -> None:
    failpoint("runner.hub_fetching")
    context.report_progress(Stage.FETCHING, done, total)
