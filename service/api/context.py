"""What every route needs: settings, database, store, and whose request it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import Depends, Query, Request

from service.access import Access
from service.api.cursors import Cursors
from service.api.gathered import Gathered
from service.api.kept_inputs import KeptInputs
from service.api.slots import Slots
from service.api.watcher import Watcher
from service.db.engine import Database
from service.records import VersionRecord
from service.settings import Settings
from service.store.blobs import BlobStore

LARGEST_PAGE = 200
CONTEXT = "bitplan.context"


@dataclass(frozen=True)
class Context:
    """One request's view of the service; `access` says whose it is, and its tenant limits every statement and
    owns the blobs of `store`. Requests share `kept` planning inputs, the `watcher` of jobs, the `slots` of
    streams and the `versions` of jobs, which are of all tenants.
    """

    settings: Settings
    database: Database
    store: BlobStore
    cursors: Cursors
    watcher: Watcher
    slots: Slots
    versions: Gathered[VersionRecord]
    access: Access = field(default_factory=Access)
    kept: KeptInputs = field(default_factory=KeptInputs)

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.access.tenant

    def of(self, access: Access) -> Context:
        """The same service as others see it."""
        return replace(self, access=access, store=BlobStore(self.settings.data_dir, access.tenant))


async def request_context(request: Request) -> Context:
    """The context that the gate gave to this request."""
    context: Context = request.scope[CONTEXT]
    return context


Ctx = Annotated[Context, Depends(request_context)]
Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="Items per page.")]
After = Annotated[
    str | None, Query(alias="cursor", max_length=4096, description="next_cursor of the page before.")
]
