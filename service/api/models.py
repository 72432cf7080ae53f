"""Models: from an upload, a server-side folder or a hub, verified by the runner before they are ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from sqlalchemy.orm import Session

from service.api.context import After, Context, Ctx, Limit
from service.api.guarded import Guarded
from service.api.idempotency import Answer, IdempotencyKey, once
from service.api.intake import check_folder_model, check_uploaded_model, store_hub_model, store_model
from service.api.lookup import find_model, stored_inventory
from service.api.pages import page_of, position
from service.api.resources import Layers, Model, Page
from service.api.usage import refuse_in_use
from service.costing import geometry_in
from service.db.repositories import models
from service.errors import Conflict, NotFound
from service.hub.place import require_offered
from service.hub.reference import HubReference
from service.records import ModelRecord
from service.states import InputState
from service.wire import ModelRequest

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=Guarded)
ModelId = Annotated[str, Path(max_length=100)]


@router.post("", status_code=201, response_model=Model)
def create_model(body: ModelRequest, context: Ctx, key: IdempotencyKey = None) -> Response:
    """Make a model from an upload, a folder of the server, or a hub's repository at one commit, which a
    runner fetches; the same files, or commit, give the same model.
    """
    asked = body.model_dump(mode="json")
    if body.hub is not None:
        require_offered(context.settings)
        wanted = HubReference(**body.hub.model_dump())
        return once(
            context,
            key,
            "POST /v1/models",
            asked,
            lambda session: model_answer(store_hub_model(context, session, wanted)),
        )
    checked = (
        check_uploaded_model(context, body.upload)
        if body.upload is not None
        else check_folder_model(context, body.folder or "")
    )

    def create(session: Session) -> Answer:
        return model_answer(store_model(context, session, checked))

    return once(context, key, "POST /v1/models", asked, create)


@router.get("")
def list_models(context: Ctx, limit: Limit = 50, cursor: After = None) -> Page[Model]:
    """Models, the newest first, without deleted ones."""
    with context.database.read() as session:
        after = position(context.cursors, "models", cursor)
        rows = models.list_page(session, limit=limit, after=after, tenant=context.tenant)
    return page_of(context.cursors, "models", rows, limit, Model.of)


@router.get("/{model_id}")
def get_model(model_id: ModelId, context: Ctx, response: Response) -> Model:
    """One model; while it is being verified, ask again after Retry-After seconds."""
    model = _existing(context, model_id)
    if model.state == InputState.VERIFYING:
        response.headers["Retry-After"] = "1"
    return Model.of(model)


@router.get("/{model_id}/layers")
def get_layers(model_id: ModelId, context: Ctx) -> Layers:
    """What can be quantized: name, operation, shape, parameters, MACs; and what was left out and why."""
    model = _existing(context, model_id)
    inventory: Mapping[str, Any] | None = stored_inventory(model)
    if inventory is None:
        raise Conflict(
            "model-not-ready",
            f"A model must be verified before its layers are known. Got state {model.state}. "
            "Ask again when GET /v1/models/{id} says ready.",
            headers={"Retry-After": "1"},
        )
    geometry = geometry_in(model.summary or {})
    return Layers.model_validate({**inventory, "caches": [] if geometry is None else geometry.attention})


@router.delete("/{model_id}", status_code=204)
def delete_model(model_id: ModelId, context: Ctx) -> None:
    """Delete a model that no unfinished job uses; finished jobs keep their scores and plans."""
    with context.database.write() as session:
        find_model(context, session, model_id)
        refuse_in_use(context, session, "model", model_id)
        models.set_state(session, model_id, InputState.DELETED)


def model_answer(model: ModelRecord) -> Answer:
    """201 with where the model is."""
    return Answer(201, Model.of(model), {"Location": f"/v1/models/{model.id}"})


def _existing(context: Context, model_id: str) -> ModelRecord:
    with context.database.read() as session:
        model = find_model(context, session, model_id)
    if model.state == InputState.DELETED:
        raise NotFound(
            "model-not-found", f"The model must exist. Got {model_id}, which was deleted. Send it again."
        )
    return model
