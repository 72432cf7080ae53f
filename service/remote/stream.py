"""The events of a job as they come, over connections that break."""

# ruff: noqa: N818 - an error is named after what went wrong

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import httpx2

from service.remote.transport import ClientError, Transport, backoff, is_busy, raise_problem, retry_after
from service.states import TERMINAL

SILENCE_SECONDS = 45.0
"""The server shows a sign of life every 15 s: after three missed ones the connection is dead."""
PROGRESS = "progress"


class NoStream(ClientError):
    """The server does not stream, or not now: ask it from time to time instead."""


@dataclass(frozen=True)
class Message:
    """An event, or with `seq` None where the job stands: `data` has the members that have changed."""

    seq: int | None
    data: dict[str, Any]


def messages(transport: Transport, path: str, after: int = 0) -> Generator[Message, None, None]:
    """What a stream says, from behind the event `after` to the last one; a connection that breaks is made
    again and continued.

    Raises `NoStream`, ProblemError, and ConnectionFailed when every retry in a row has failed.
    """
    own, failures = transport.http.timeout, 0
    timeout = httpx2.Timeout(connect=own.connect, read=SILENCE_SECONDS, write=own.write, pool=own.pool)
    while True:
        error: Exception = ClientError("the stream ended before the job")
        pause = None
        headers = {"Last-Event-ID": str(after)} if after else {}
        try:
            with transport.http.sse(path, headers=headers, timeout=timeout) as source:
                if source.response.status_code == 204:
                    return
                pause = _refusal(source.response)
                for event in () if pause is not None else source:
                    if event.event == PROGRESS:
                        failures = 0
                        yield Message(None, json.loads(event.data))
                    elif event.data:
                        failures, after = 0, int(event.id)
                        yield Message(after, json.loads(event.data))
                        if event.event in TERMINAL:
                            return
        except httpx2.TransportError as broken:
            error = broken
        if failures >= transport.retries:
            raise transport.unreachable(error)
        transport.pause(pause or backoff(failures))
        failures += 1


def _refusal(response: httpx2.Response) -> float | None:
    """None for a stream, the seconds to wait for a server that is busy. Raises NoStream and ProblemError."""
    if response.status_code >= 400:
        response.read()
        if response.status_code == 429:
            raise NoStream("too many open streams")
        if is_busy(response):
            return retry_after(response) or 0.0
        raise_problem(response)
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        raise NoStream("the server has no streams")
    return None
