"""A job's events as server-sent events: replayed from `Last-Event-ID`, then as they come, to the last one.

A stream remembers the number of the event that it sent last and nothing else. It waits while its client does
not read, and then reads what it has missed from the shared tail or, page by page, from the database: a client
that never reads costs its connection and no more.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
from fastapi import Header, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from service.api.context import Context
from service.api.lookup import find_job
from service.api.watcher import Frame, Topic, Watcher, frame_of
from service.db.engine import Database
from service.db.repositories import events
from service.errors import Unavailable

MEDIA_TYPE = "text/event-stream"
HEARTBEAT_SECONDS = 15.0
LONGEST_SECONDS = 600.0
"""Then the client is to come again, so that a key that was revoked meanwhile is noticed."""
RECONNECT_MILLISECONDS = 2000
PAGE = 32
"""Missed events that are read at a time."""
_EVENT = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    "description": "Per event its number (id), its type (event) and the JSON of the event (data); in between"
    " `progress` without an id: state, stage and progress of the job.",
}
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"}

STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "A page of events, or a stream.", "content": {MEDIA_TYPE: {"itemSchema": _EVENT}}},
    204: {"description": "The job has ended and there is no event behind Last-Event-ID."},
    429: {"description": "Too many open streams; Retry-After says when to ask again."},
}

Accept = Annotated[
    str | None,
    Header(alias="Accept", include_in_schema=False),
]
LastEventId = Annotated[
    int | None,
    Header(
        alias="Last-Event-ID",
        ge=0,
        lt=2**63,
        description="The id of the last event that you have: the stream begins behind it.",
    ),
]


def wants_stream(accept: str | None) -> bool:
    """Whether an Accept header asks for a stream of events.

    >>> wants_stream("text/event-stream"), wants_stream("application/json, */*"), wants_stream(None)
    (True, False, False)
    """
    named = (part.partition(";")[0].strip().lower() for part in (accept or "").split(","))
    return MEDIA_TYPE in named


def open_stream(context: Context, job_id: str, last_id: int | None) -> Response:
    """The stream of a job; 204, at which browsers stop to reconnect, when it has ended and all was seen.

    Raises NotFound, TooMany, and Unavailable while the service stops.
    """
    if context.watcher.closing:
        detail = "The service must run to send events. Got a request while it stops. Ask again in a moment."
        raise Unavailable("stopping", detail, headers={"Retry-After": "2"})
    who = context.access.key_id or context.tenant
    context.slots.take(who)
    try:
        with context.database.read() as session:
            job = find_job(context, session, job_id)
            seen = job.finished and last_id and not events.list_after(session, job_id, last_id, 1)
    except BaseException:
        context.slots.give_back(who)
        raise
    if seen:
        context.slots.give_back(who)
        return Response(status_code=204, headers={"Vary": "Accept"})
    return _Stream(context, who, job_id, last_id or 0)


class _Stream(EventSourceResponse):
    """Watches the job while it is sent, and gives its slot back however it ends."""

    def __init__(self, context: Context, who: str, job_id: str, sent: int) -> None:
        super().__init__(iter(()), headers=HEADERS)
        self._context, self._who, self._job_id, self._sent = context, who, job_id, sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the last one, or until the client is gone."""
        context = self._context
        try:
            with context.watcher.topic(self._job_id) as topic:
                self.body_iterator = _frames(
                    context.watcher, topic, context.database, self._job_id, self._sent
                )
                await super().__call__(scope, receive, send)
        finally:
            context.slots.give_back(self._who)


async def _frames(
    watcher: Watcher, topic: Topic, database: Database, job_id: str, sent: int
) -> AsyncIterator[bytes]:
    """The events behind `sent` and, in between, where the job stands and signs of life."""
    yield format_sse_event(retry=RECONNECT_MILLISECONDS)
    shown, until = b"", time.monotonic() + LONGEST_SECONDS
    while not (watcher.closing or topic.gone or time.monotonic() > until):
        signal = topic.signal
        while missed := await _behind(topic, database, job_id, sent):
            for frame in missed:
                yield frame.data
                sent = frame.seq
                if frame.last:
                    return
        if topic.standing is not None and topic.standing.finished:
            return
        if topic.progress != shown:
            shown = topic.progress
            yield shown
        with anyio.move_on_after(HEARTBEAT_SECONDS) as quiet:
            await signal.wait()
        if quiet.cancelled_caught:
            yield KEEPALIVE_COMMENT


async def _behind(topic: Topic, database: Database, job_id: str, sent: int) -> list[Frame]:
    """The next events behind `sent`: of the tail, or the first few of the database that come before it."""
    if topic.seq <= sent:
        return []
    if topic.tail[0].seq <= sent + 1:
        return [frame for frame in topic.tail if frame.seq > sent]

    def page() -> list[Frame]:
        with database.read() as session:
            return [frame_of(event) for event in events.list_after(session, job_id, sent, PAGE)]

    return await run_in_threadpool(page)
