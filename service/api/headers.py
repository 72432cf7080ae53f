"""The headers that browsers obey, and who may keep an answer."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import Scope

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
TLS_HEADERS = {"Strict-Transport-Security": "max-age=31536000"}
PRIVATE, SECRET = b"private, no-cache", b"no-store"

Raw = list[tuple[bytes, bytes]]


def _raw(headers: Iterable[tuple[str, str]]) -> Raw:
    return [(name.lower().encode(), value.encode()) for name, value in headers]


_FIXED, _TLS = _raw(HEADERS.items()), _raw(TLS_HEADERS.items())


def completed(scope: Scope, headers: Raw) -> Raw:
    """The headers of an answer with those that it lacks; what a route has set stays."""
    added = [*_FIXED, *(_TLS if scope["scheme"] == "https" else ())]
    if scope["path"].startswith("/v1"):
        kept = PRIVATE if scope["method"] in ("GET", "HEAD") else SECRET
        added += [(b"cache-control", kept), (b"vary", b"Authorization")]
    present = {name.lower() for name, _ in headers}
    missing = [pair for pair in added if pair[0] not in present]
    return [*headers, *missing]
