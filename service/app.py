"""The API process: `uvicorn service.app:app`. It never loads torch and measures nothing; runners do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

import structlog
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from service import logs
from service.api import (
    audit,
    calibrations,
    catalogs,
    checkpoints,
    correlations,
    doc_pages,
    explanations,
    exports,
    frontier,
    health,
    jobs,
    made_calibrations,
    models,
    plans,
    problems,
    scores,
    uploads,
    webhooks,
)
from service.api.context import Context
from service.api.cursors import Cursors, load_secret
from service.api.gate import Gate
from service.api.gathered import Gathered
from service.api.requests import Requests
from service.api.scopes import with_security
from service.api.security import Secured
from service.api.slots import Slots
from service.api.stopping import calling_at_stop
from service.api.watcher import Watcher
from service.db import migrate
from service.db.engine import Database
from service.db.repositories.jobs import versions
from service.records import VersionRecord
from service.settings import Settings
from service.store.blobs import BlobStore

DESCRIPTION = """\
Bitplan decides how many bits each layer of a neural network gets.

1. `POST /v1/uploads` declares files, `PUT /v1/uploads/{id}/blobs/{sha256}` sends them, `POST .../complete`
   makes a model or a calibration set of them.
2. `POST /v1/jobs` measures what each layer loses in each scheme and plans your budgets.
3. `GET /v1/jobs/{id}` until it has succeeded, then `GET /v1/jobs/{id}/plans`, and for the plan file
   `GET /v1/plans/{id}/document`.

Errors are `application/problem+json` (RFC 9457). Where the server has keys, each request brings one:
`Authorization: Bearer bitplan_...`.
"""
ROUTERS = (
    jobs.polls,
    uploads.router,
    models.router,
    calibrations.router,
    made_calibrations.router,
    jobs.router,
    webhooks.router,
    scores.router,
    frontier.router,
    correlations.router,
    plans.router,
    explanations.router,
    exports.router,
    checkpoints.router,
    catalogs.router,
    audit.router,
    health.router,
)


log = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; `settings` default to the environment. The database is opened when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        chosen = settings or Settings()
        logs.configure(chosen.log_level)
        logs.adopt_libraries(chosen.log_level)
        context = open_context(chosen)
        if chosen.access == "open":
            log.warning("no keys are asked for: whoever can connect may do everything")
        app.state.context, app.state.gate = context, Gate(context)
        try:
            with calling_at_stop(context.watcher.close):
                yield
        finally:
            await context.watcher.end()
            context.versions.close()
            context.database.close()

    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        title="Bitplan",
        version=version("bitplan"),
        description=DESCRIPTION,
        lifespan=lifespan,
        responses=problems.PROBLEM_RESPONSES,
        generate_unique_id_function=_operation_id,
    )
    problems.install(app)
    app.add_api_route("/", _to_docs, include_in_schema=False)
    app.add_middleware(Secured)
    app.add_middleware(Requests)
    doc_pages.install(app)
    for router in ROUTERS:
        app.include_router(router)
    describe = app.openapi
    app.openapi = lambda: with_security(describe())  # type: ignore[method-assign]
    return app


def open_context(settings: Settings) -> Context:
    """Database, store and secret of a data directory.

    The database is migrated first; processes that start together wait in line. Raises `DatabaseTooNew`.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    migrate.upgrade(settings.database_url)
    database = Database(settings.database_url)
    try:
        migrate.check(database)
        cursors = Cursors(load_secret(settings.data_dir / "cursor.key"))
    except BaseException:
        database.close()
        raise
    slots = Slots(settings.max_streams, settings.max_streams_per_client)
    return Context(
        settings,
        database,
        BlobStore(settings.data_dir),
        cursors,
        watcher=Watcher(database),
        slots=slots,
        versions=Gathered(partial(_versions, database)),
    )


def _versions(database: Database, job_ids: Sequence[str]) -> dict[str, VersionRecord]:
    with database.read() as session:
        return versions(session, job_ids)


def _to_docs() -> RedirectResponse:
    return RedirectResponse("/docs")


def _operation_id(route: APIRoute) -> str:
    return route.name


app = create_app()
