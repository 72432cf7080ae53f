"""The route class of every operation: the gate before it, the audit log around each write.

Both come before the body is read, so a stranger's bytes are not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.types import Message

from service.api.context import CONTEXT, Context
from service.api.gate import require_scope
from service.api.peers import is_local
from service.api.requests import SCOPE_KEY
from service.api.scopes import scope_of
from service.db.repositories import audit
from service.errors import ServiceError

READS = frozenset({"GET", "HEAD"})
LARGEST_BODY = 16 * 2**20
"""Bytes of a body that is read as a whole: a manifest of 10,000 files has some four million."""
STREAMED = frozenset({"put_blob", "patch_blob"})
"""Operations that read their body piece by piece, up to the size that was declared."""
Handler = Callable[[Request], Awaitable[Response]]

log = structlog.get_logger(__name__)


class Guarded(APIRoute):
    """A route whose operation stands in `SCOPES`; making one that does not raises LookupError."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind the gate."""
        handler, name, needed = self.operation(), self.name, scope_of(self.name)

        async def guarded(request: Request) -> Response:
            if needed is None:
                request.scope[CONTEXT] = request.app.state.context
                return await handler(request)
            context: Context = await request.app.state.gate.admit(request)
            request.scope[CONTEXT] = context
            if name not in STREAMED:
                request = _bounded(request)

            async def allowed(request: Request) -> Response:
                require_scope(context.access, needed)
                return await handler(request)

            if request.method in READS or _own(context, request):
                return await allowed(request)
            return await _audited(context, request, name, allowed)

        return guarded

    def operation(self) -> Handler:
        """What runs behind the gate."""
        return super().get_route_handler()


def _bounded(request: Request) -> Request:
    """The same request, whose body ends in a 413 when it has more than LARGEST_BODY bytes."""
    declared = request.headers.get("Content-Length", "")
    if declared.isdigit() and int(declared) > LARGEST_BODY:
        raise HTTPException(413)
    arrived = 0

    async def receive() -> Message:
        nonlocal arrived
        message = await request.receive()
        arrived += len(message.get("body", b""))
        if arrived > LARGEST_BODY:
            raise HTTPException(413)
        return message

    return Request(request.scope, receive)


def _own(context: Context, request: Request) -> bool:
    """A request of this machine that needed no key."""
    return context.access.key_id is None and is_local(request.client)


async def _audited(context: Context, request: Request, name: str, handler: Handler) -> Response:
    """Write down that a write begins, then how it was answered; where the process dies, the first stays."""
    ident = await run_in_threadpool(_begin, context, request, name)
    status = 500
    try:
        response = await handler(request)
        status = response.status_code
        return response
    except HTTPException as error:
        status = error.status_code
        raise
    except (ServiceError, RequestValidationError) as error:
        status = getattr(error, "status", 422)
        raise
    finally:
        await run_in_threadpool(_finish, context, ident, status)


def _begin(context: Context, request: Request, name: str) -> str:
    with context.database.write() as session:
        return audit.begin(
            session,
            context.access,
            action=name,
            method=request.method,
            path=request.url.path,
            peer=request.client.host if request.client else None,
            request_id=str(request.scope[SCOPE_KEY]),
        )


def _finish(context: Context, ident: str, status: int) -> None:
    """The write has been done, so its answer is given even where this fails."""
    try:
        with context.database.write() as session:
            audit.finish(session, ident, status)
    except DBAPIError as error:
        log.error("audit log not finished", audit=ident, status=status, exc_info=error)
