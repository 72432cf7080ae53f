"""What every answer carries, whatever made it: the headers that browsers obey.

A key in a query string is refused here, before anything else sees it.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.headers import completed
from service.api.problems import respond
from service.errors import BadRequest

_KEY_IN_QUERY = re.compile(
    rb"bitplan_[0-9a-f]{12}_|(?:^|&)(?:api[_-]?key|key|token|access_token|authorization)=", re.IGNORECASE
)


class Secured:
    """Middleware around the whole application; what a route sets itself stays."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = completed(scope, list(message.get("headers", ())))
            await send(message)

        if scope["query_string"] and _KEY_IN_QUERY.search(unquote_to_bytes(scope["query_string"])):
            await respond(Request(scope), _key_in_query())(scope, receive, secured)
        else:
            await self.app(scope, receive, secured)


def _key_in_query() -> BadRequest:
    return BadRequest(
        "key-in-query",
        "A key must come in the Authorization header. Got one in the query string, which logs and histories "
        "keep. Revoke it with `bitplan keys revoke` and make another.",
    )
