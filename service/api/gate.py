"""The gate in front of every operation: whose request is it, and may it do this?"""

from __future__ import annotations

import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime

import structlog
from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from service.access import Access, Scope, digest_of, prefix_of
from service.api.buckets import Buckets
from service.api.context import Context
from service.api.peers import is_local, refuse_foreign_pages
from service.db.repositories import keys
from service.errors import Forbidden, ServiceError, TooMany, Unauthorized
from service.records import KeyRecord

KEY_SECONDS = 5.0
"""How long a key that was found good is not looked up again: what a revocation takes at most."""
MOST_KEYS = 10_000
FAILURES_PER_SECOND, FAILURES_AT_ONCE = 1.0, 20
HOW_TO_BRING = (
    "Ask whoever runs the server for one (`bitplan keys create`), then set BITPLAN_KEY or use --key-file."
)

log = structlog.get_logger(__name__)


class Gate:
    """Admits requests. One per API process, used from its event loop only.

    A key that is cached costs a hash and a look into a dictionary; only its digest is remembered.
    """

    def __init__(self, context: Context, clock: Callable[[], float] = time.monotonic) -> None:
        settings = context.settings
        self._context, self._clock = context, clock
        self._known: OrderedDict[str, tuple[Context, float]] = OrderedDict()
        self._keys_exist, self._asked_at = False, -math.inf
        self._requests = Buckets(settings.rate_limit, settings.rate_burst, clock)
        self._failures = Buckets(FAILURES_PER_SECOND, FAILURES_AT_ONCE, clock)

    async def admit(self, request: Request) -> Context:
        """The context of a request, with its tenant. Raises Unauthorized, Forbidden, TooMany."""
        header = request.headers.get("authorization")
        context = await (self._without_key(request) if header is None else self._with_key(request, header))
        access = context.access
        if access.key_id is not None:
            self._limit_rate(access.key_id)
        return context

    async def _without_key(self, request: Request) -> Context:
        """Only where the operator said so, or on this machine while there are no keys."""
        mode = self._context.settings.access
        if mode == "open":
            return self._context
        if mode == "keys" or await self._have_keys():
            raise _unauthorized(
                "key-missing",
                "A request must bring a key: Authorization: Bearer bitplan_.... Got none. " + HOW_TO_BRING,
            )
        if not is_local(request.client):
            raise Forbidden(
                "no-keys",
                "A request from another machine must bring a key, and this server has none. Got one from "
                f"{_address(request)}. Make a key with `bitplan keys create`, or come through an SSH tunnel.",
            )
        refuse_foreign_pages(request)
        return self._context

    async def _have_keys(self) -> bool:
        """Whether a key was ever made; asked again after a while, until it is so."""
        if not self._keys_exist and self._clock() - self._asked_at >= KEY_SECONDS:
            self._keys_exist = await run_in_threadpool(self._read_whether_keys_exist)
            self._asked_at = self._clock()
        return self._keys_exist

    async def _with_key(self, request: Request, header: str) -> Context:
        kind, _, token = header.partition(" ")
        digest = digest_of(token.strip())
        known = self._known.get(digest)
        if known is not None and known[1] > self._clock():
            return known[0]
        peer = _address(request)
        if known is None and (wait := self._failures.wait(peer)):
            raise _too_fast("wrong-keys", "An address must not try wrong keys one after another.", wait)
        try:
            record = await run_in_threadpool(self._find, kind, token.strip(), digest)
        except Unauthorized as error:
            self._known.pop(digest, None)
            self._failures.take(peer)
            log.warning("key refused", problem=error.slug, peer=peer, path=request.url.path)
            raise
        return self._remember(digest, record)

    def _find(self, kind: str, token: str, digest: str) -> KeyRecord:
        """The stored key of a token. Raises Unauthorized; that it is known is told to its owner only."""
        prefix = prefix_of(token) if kind.lower() == "bearer" else None
        with self._context.database.read() as session:
            record = None if prefix is None else keys.find(session, prefix)
        stored = "" if record is None else record.digest
        if not hmac.compare_digest(stored, digest) or record is None:
            raise _unauthorized(
                "key-unknown",
                "A key must be one of this server, sent as Authorization: Bearer bitplan_.... Got another. "
                "Check it for missing characters; where the server has no keys, send none.",
            )
        state = record.state(datetime.now(UTC))
        if state != "active":
            raise _unauthorized(
                f"key-{state}", f"A key must be active. Got {record.id}, which is {state}. {HOW_TO_BRING}"
            )
        return record

    def _remember(self, digest: str, record: KeyRecord) -> Context:
        lasts = KEY_SECONDS
        if record.expires_at is not None:
            lasts = min(lasts, (record.expires_at - datetime.now(UTC)).total_seconds())
        context = self._context.of(Access(record.tenant, record.scope, record.id))
        self._known[digest] = (context, self._clock() + lasts)
        self._known.move_to_end(digest)
        if len(self._known) > MOST_KEYS:
            self._known.popitem(last=False)
        return context

    def _limit_rate(self, key_id: str) -> None:
        if wait := self._requests.take(key_id):
            rate, burst = self._requests.per_second, self._requests.burst
            raise _too_fast(
                "rate-limited",
                f"A key must send at most {rate:g} requests a second, {burst:g} at once.",
                wait,
                {"per_second": rate, "burst": burst},
            )

    def _read_whether_keys_exist(self) -> bool:
        with self._context.database.read() as session:
            return keys.exist(session)


def require_scope(access: Access, needed: Scope) -> None:
    """Raise Forbidden unless the request may do what needs this scope."""
    if not access.scope.allows(needed):
        raise Forbidden(
            "scope-too-small",
            f"A key must have the scope {needed} for this. Got {access.key_id} with {access.scope}. Use "
            "another key, or ask whoever runs the server for one.",
            extra={"needed": needed.value, "scope": access.scope.value},
        )


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _unauthorized(slug: str, detail: str) -> Unauthorized:
    return Unauthorized(slug, detail, headers={"WWW-Authenticate": 'Bearer realm="bitplan"'})


def _too_fast(slug: str, rule: str, wait: float, extra: dict[str, float] | None = None) -> ServiceError:
    seconds = max(1, math.ceil(wait))
    return TooMany(
        slug, f"{rule} Got more. Wait {seconds} s.", extra=extra, headers={"Retry-After": str(seconds)}
    )
