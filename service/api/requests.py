"""Every request has an id, one line in the log, and its place in the metrics."""

from __future__ import annotations

import re
import time
from functools import cache
from random import getrandbits

import structlog
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics

HEADER = "X-Request-ID"
_HEADER = HEADER.lower().encode()
SCOPE_KEY = "bitplan.request_id"
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that monitoring asks for every few seconds: logged at debug."""
CUT_OFF = 499
"""The status of a request whose client was gone before the answer began."""
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger()


class Requests:
    """Gives each request its id: the client's own `X-Request-ID` where it is plain, else a new one.

    The answer names it, every line that is logged meanwhile has it as `request_id`, and so has the line at
    its end. Paths are logged, queries, headers and bodies never.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), CUT_OFF
        ident = request_id(Headers(scope=scope).get(HEADER))

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (_HEADER, ident.encode())]
            await send(message)

        scope[SCOPE_KEY] = ident
        with structlog.contextvars.bound_contextvars(request_id=ident):
            try:
                await self.app(scope, receive, answer)
            except BaseException:
                status = 500 if status == CUT_OFF else status
                raise
            finally:
                _tell(scope, status, time.perf_counter() - began)


def request_id(given: str | None) -> str:
    """The id that a client gave, if it can stand in a log, or a new one.

    >>> request_id("abc-1"), len(request_id("two words")), len(request_id(None))
    ('abc-1', 32, 32)
    """
    return given if given is not None and _PLAIN.fullmatch(given) else f"{getrandbits(128):032x}"


def _tell(scope: Scope, status: int, seconds: float) -> None:
    method, path = scope["method"], scope["path"]
    route = getattr(scope.get("route"), "path", "none")
    say = log.debug if path in QUIET else log.info
    say(
        "request",
        method=method,
        path=path[:200],
        status=status,
        milliseconds=round(seconds * 1000, 1),
    )
    known = method if method in METHODS else "other"
    count, duration = _series(known, route, status)
    count.inc()
    duration.observe(seconds)


@cache
def _series(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """The series of these labels, which are few."""
    return metrics.REQUESTS.labels(method, route, str(status)), metrics.REQUEST_SECONDS.labels(method, route)


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Labels are bounded, whatever strangers send."""
