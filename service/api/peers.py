"""Who sends a request, where no key says so: this machine, another one, or a page of a web browser."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request

from service.access import is_local_host
from service.errors import Forbidden

Peer = tuple[str, int] | None


def is_local(client: Peer) -> bool:
    """Whether a peer is this machine; peers without an address (a Unix socket, a test) are.

    >>> is_local(("127.0.0.1", 5)), is_local(("192.0.2.1", 5)), is_local(None)
    (True, False, True)
    """
    return client is None or is_local_host(client[0]) or not _is_address(client[0])


def refuse_foreign_pages(request: Request) -> None:
    """Raise Forbidden for a request that a page of another site makes a browser on this machine send.

    Such a page reaches this machine under a name of its own (DNS rebinding) or says that it is foreign.
    """
    if request.client is None or not _is_address(request.client.host):
        return
    host = request.headers.get("host", "")
    if not is_local_host(urlsplit(f"//{host}").hostname or ""):
        raise Forbidden(
            "foreign-host",
            "A request without a key must name this machine as its host: localhost or 127.0.0.1. "
            f"Got {host[:80]!r}. Use such an address, or make keys with `bitplan keys create`.",
        )
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden(
            "foreign-origin",
            f"A request without a key must not come from another site's page. Got one from {origin[:80]!r}. "
            "Make keys with `bitplan keys create` and send one.",
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
