"""Idempotency-Key: a repeated POST gets the first answer, and the work is done once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Header, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from quant.digest import digest
from service.api.context import Context
from service.db.repositories import idempotency, retention
from service.errors import Conflict, Unprocessable
from service.failpoints import failpoint
from service.records import IdempotencyRecord

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Any text of yours, such as a UUID: the same key and body give the same answer again.",
    ),
]


_in_progress: set[tuple[str, str, str]] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What a POST answers with."""

    status: int
    body: BaseModel
    headers: Mapping[str, str] = field(default_factory=dict)


def once(
    context: Context, key: str | None, route: str, request: Any, action: Callable[[Session], Answer]
) -> Response:
    """Run `action` in one transaction, unless `key` was used before: then repeat its answer.

    The key is committed with what `action` wrote, so a request that was killed can be repeated at once.
    Raises Unprocessable when the key came with another request, Conflict while the first one is being
    answered.
    """
    if key is None:
        with context.database.write() as session:
            retention.share(session)
            answer = action(session)
            failpoint("api.before_commit")
        failpoint("api.after_commit")
        return _response(answer)
    request_digest = digest([route, request])
    with _answering((context.database.url, context.tenant, key)), context.database.write() as session:
        retention.share(session)
        known = idempotency.begin(session, key, request_digest, tenant=context.tenant)
        if known is not None:
            return _repeat(known, request_digest)
        answer = action(session)
        body = answer.body.model_dump(mode="json")
        idempotency.finish(
            session, key, status=answer.status, body=body, headers=answer.headers, tenant=context.tenant
        )
        failpoint("api.before_commit")
    failpoint("api.after_commit")
    return _response(answer)


@contextmanager
def _answering(key: tuple[str, str, str]) -> Iterator[None]:
    """Hold the key while this process answers its request; another process waits in the database instead."""
    with _lock:
        if key in _in_progress:
            raise Conflict(
                "idempotency-key-in-use",
                "An Idempotency-Key must be answered before it is used again. Got it while the first request "
                "is still running. Try again in a second.",
                headers={"Retry-After": "1"},
            )
        _in_progress.add(key)
    try:
        yield
    finally:
        with _lock:
            _in_progress.discard(key)


def _repeat(known: IdempotencyRecord, request_digest: str) -> Response:
    if known.request_digest != request_digest:
        raise Unprocessable(
            "idempotency-key-reused",
            "An Idempotency-Key must stand for one request. Got it again with another request. Use a new "
            "key.",
        )
    assert known.status is not None, "a key is committed with its answer"
    headers = {**known.headers, "Idempotent-Replayed": "true"}
    return Response(json.dumps(known.body), known.status, headers, media_type="application/json")


def _response(answer: Answer) -> Response:
    return Response(
        answer.body.model_dump_json(), answer.status, dict(answer.headers), media_type="application/json"
    )
