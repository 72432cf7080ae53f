"""What clients saw, request by request, in the order of one clock that they share."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx2

from service.client import Client

LONGEST_PAUSE_SECONDS = 0.4


@dataclass(frozen=True)
class Seen:
    """One attempt of one request, as its client saw it.

    began, ended   ticks of a counter that all clients share: of two attempts A and B, A is before B where
                   ``A.ended < B.began``; else they overlap
    at             when it ended, in seconds of a monotonic clock
    key            the Idempotency-Key, which a repeated attempt brings again
    status         None where no answer came: whether the request was carried out is not known
    sent, got      JSON of the request and of the answer, None where they are something else
    """

    client: str
    began: int
    ended: int
    at: float
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    sent: Any = None
    status: int | None = None
    got: Any = None
    error: str | None = None

    @property
    def accepted(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def before(self, other: Seen) -> bool:
        return self.ended < other.began


class History:
    """Collects what clients see; safe to share between threads."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._ticks, self._lock = count(1), threading.Lock()

    def tick(self) -> int:
        with self._lock:
            return next(self._ticks)

    def add(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def save(self, path: Path) -> None:
        """One JSON object per line, in the order in which the answers came."""
        with path.open("w", encoding="utf-8") as file:
            for seen in sorted(self.seen, key=lambda one: one.ended):
                file.write(json.dumps(asdict(seen)) + "\n")


def load_history(path: Path) -> list[Seen]:
    """The inverse of `History.save`."""
    return [Seen(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


class Witness(httpx2.BaseTransport):
    """The transport of one client: writes down every attempt, those without an answer too."""

    def __init__(self, client: str, history: History) -> None:
        self._client, self._history = client, history
        self._inner = httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        began = self._history.tick()
        asked = {
            "client": self._client,
            "began": began,
            "method": request.method,
            "path": request.url.path,
            "query": dict(request.url.params),
            "key": request.headers.get("Idempotency-Key"),
            "sent": _json(request.headers, lambda: request.content),
        }
        try:
            response = self._inner.handle_request(request)
            response.read()
        except httpx2.TransportError as error:
            said = f"{type(error).__name__}: {error}"
            self._history.add(Seen(**asked, ended=self._history.tick(), at=time.monotonic(), error=said))
            raise
        answer = {"status": response.status_code, "got": _json(response.headers, lambda: response.content)}
        self._history.add(Seen(**asked, ended=self._history.tick(), at=time.monotonic(), **answer))
        return response

    def close(self) -> None:
        self._inner.close()


def _json(headers: Mapping[str, str], content: Callable[[], bytes]) -> Any:
    kind = headers.get("Content-Type", "")
    if not kind.startswith(("application/json", "application/problem+json")):
        return None
    try:
        return json.loads(content())
    except ValueError:
        return None


@contextmanager
def witnessing(url: str, name: str, history: History, retries: int = 1000) -> Iterator[Client]:
    """The ordinary client with its ordinary retries, but shorter pauses, so that more happens in a second."""
    with Client(http=httpx2.Client(base_url=url, timeout=60.0, transport=Witness(name, history))) as client:
        client.transport.retries = retries
        client.transport.pause = lambda seconds: time.sleep(min(seconds, LONGEST_PAUSE_SECONDS))
        yield client


def accepted(seen: Iterable[Seen], method: str, *, prefix: str = "/v1/", suffix: str = "") -> Iterator[Seen]:
    """The attempts that were answered 2xx, of this method and of paths that begin and end so."""
    for one in seen:
        if (
            one.accepted
            and one.method == method
            and one.path.startswith(prefix)
            and one.path.endswith(suffix)
        ):
            yield one
