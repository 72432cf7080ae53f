"""Requests that survive a bad connection, and problem documents as exceptions.

ClientError
  ConnectionFailed   the server could not be reached, after every retry
  ProblemError       the server said no (RFC 9457)
  JobFailed          a job ended in another state than succeeded
"""

# ruff: noqa: N818 - an error is named after what went wrong

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx2

from service.errors import slug_of

BUSY = frozenset({429, 502, 503, 504})


class ClientError(Exception):
    """Anything that went wrong between the client and the service."""


class ConnectionFailed(ClientError):
    """The server could not be reached."""


class ProblemError(ClientError):
    """A problem document; `slug` names the kind, `pointer` the member of the request."""

    def __init__(self, status: int, document: Mapping[str, Any]) -> None:
        self.status, self.document = status, document
        self.slug = slug_of(document)
        self.detail = str(document.get("detail") or document.get("title") or f"HTTP status {status}")
        self.pointer = document.get("pointer")
        super().__init__(self.detail + (f" (at {self.pointer})" if self.pointer else ""))


class JobFailed(ClientError):
    """A job that was waited for did not succeed; `resource` is the job as it ended."""

    def __init__(self, resource: Mapping[str, Any]) -> None:
        self.resource = resource
        problem = resource.get("problem") or {}
        super().__init__(
            f"Job {resource['id']} must succeed. Got {resource['state']}: "
            f"{problem.get('detail', 'no reason given')} Its scores are kept: resume it to go on from them."
        )


class Transport:
    """One connection pool with one retry policy: connection errors and busy answers, with growing pauses.

    Requests that change something carry an Idempotency-Key, so that a repeated one is not done twice.
    """

    def __init__(
        self,
        http: httpx2.Client,
        *,
        retries: int = 5,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.http, self.retries, self.pause = http, retries, pause

    def get(self, path: str, query: Mapping[str, Any] | None = None) -> Any:
        """The JSON of a resource."""
        return self.send("GET", path, query=query).json()

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Create or start something; the same call is never carried out twice."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return self.send("POST", path, body=body, headers=headers).json()

    def pages(self, path: str, query: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The items of all pages of a list."""
        asked = {"limit": 200, **(query or {})}
        while True:
            page = self.get(path, asked)
            yield from page["items"]
            if not page.get("next_cursor"):
                return
            asked["cursor"] = page["next_cursor"]

    def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        """One request with its retries; raises ProblemError for 4xx and 5xx answers, ConnectionFailed at the
        end.
        """
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                response = self.http.request(method, path, params=query, json=body, headers=headers)
            except httpx2.TransportError as error:
                if last:
                    raise self.unreachable(error) from error
                self.pause(backoff(attempt))
                continue
            if is_busy(response) and not last:
                self.pause(retry_after(response) or backoff(attempt))
                continue
            return raise_problem(response)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def unreachable(self, error: Exception) -> ConnectionFailed:
        """What a connection that broke for the last time is told as."""
        return ConnectionFailed(
            f"The Bitplan server must be reachable at {self.http.base_url}. Got {type(error).__name__}: "
            f"{error}. Start it with `bitplan serve`, or give the address of a running one."
        )


def is_busy(response: httpx2.Response) -> bool:
    """Whether the same request may do better in a moment; also when its first try is still being
    answered.
    """
    if response.status_code == 409:
        response.read()
        return "idempotency-key-in-use" in response.text
    return response.status_code in BUSY


def backoff(attempt: int) -> float:
    """Seconds to wait after a failed attempt: a quarter second, doubling, at most eight.

    >>> [backoff(n) for n in range(4)]
    [0.25, 0.5, 1.0, 2.0]
    """
    return float(min(0.25 * 2**attempt, 8.0))


def retry_after(response: httpx2.Response) -> float | None:
    """The seconds that the server asks to wait, if it says so."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def raise_problem(response: httpx2.Response) -> httpx2.Response:
    """The response, or ProblemError for a 4xx or 5xx answer."""
    if response.status_code < 400:
        return response
    try:
        document = response.json()
    except ValueError:
        document = {}
    raise ProblemError(response.status_code, document if isinstance(document, dict) else {})
