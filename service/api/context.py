"""What every route needs: settings, database, store, and whose request it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Query, Request

from service.api.cursors import Cursors
from service.api.kept_inputs import KeptInputs
from service.api.slots import Slots
from service.api.watcher import Watcher
from service.db.engine import Database
from service.settings import Settings
from service.store.blobs import BlobStore

LARGEST_PAGE = 200


@dataclass(frozen=True)
class Context:
    """One request's view of the service; `tenant` limits every statement it makes. Requests share `kept`
    planning inputs, the `watcher` of jobs and the `slots` of streams.
    """

    settings: Settings
    database: Database
    store: BlobStore
    cursors: Cursors
    watcher: Watcher
    slots: Slots
    tenant: str = "default"
    kept: KeptInputs = field(default_factory=KeptInputs)


async def request_context(request: Request) -> Context:
    """The context of a request. The tenant is always "default" until there are keys to tell tenants apart."""
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(request_context)]
Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="Items per page.")]
After = Annotated[
    str | None, Query(alias="cursor", max_length=4096, description="next_cursor of the page before.")
]
