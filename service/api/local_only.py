"""Until access control exists, only this machine is served, however the API was started."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.problems import respond
from service.errors import Forbidden


class LocalOnly:
    """Answers 403 to every peer whose address is not a loopback address.

    `bitplan serve` does not bind to other addresses; this holds when `uvicorn service.app:app --host` does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or refuse it."""
        if scope["type"] == "http" and not is_local(scope.get("client")):
            refused = Forbidden(
                "access-control-missing",
                "Requests must come from this machine, because access control does not exist yet. "
                f"Got one from {scope['client'][0]}. Reach the service through an SSH tunnel.",
            )
            await respond(Request(scope), refused)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def is_local(client: tuple[str, int] | None) -> bool:
    """Whether a peer is this machine; peers without an address (a Unix socket, a test) are.

    >>> is_local(("127.0.0.1", 5)), is_local(("192.0.2.1", 5)), is_local(None)
    (True, False, True)
    """
    if client is None:
        return True
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
