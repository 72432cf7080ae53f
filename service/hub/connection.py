"""Asking a hub: GET alone, to checked addresses, at a least pace, no proxy, no cookie, few redirects."""

# ruff: noqa: N818 - an error is named after what went wrong

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from urllib.parse import urljoin

import httpcore2

from service.errors import Forbidden, NotFound, ServiceError, Unauthorized
from service.hub.listing import LARGEST_LISTING, mismatch
from service.hub.place import HubPlace
from service.webhooks.guard import Destination, DestinationRefused, NameNotFound

MOST_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
CONNECT_SECONDS = 10.0
GLANCE_SECONDS = 0.5
"""How long a read blocks before `pause` is asked whether to go on."""
PATIENCE_SECONDS = 120.0
LEAST_BYTES = 2**20
"""What must come in PATIENCE_SECONDS, as for uploads."""
LONGEST_WAIT = 120.0
ADDRESSES = 3

Option = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
Headers = list[tuple[bytes, bytes]]


class HubAway(Exception):
    """The hub cannot be reached, is busy or too slow: the same question may be answered later."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class Answer:
    """An answer whose body comes in pieces; `whole` when a part was asked for and everything comes."""

    def __init__(self, response: httpcore2.Response, commit: str | None) -> None:
        self._response, self.commit = response, commit
        self.whole = response.status != 206

    def header(self, name: str) -> str | None:
        """A header of it, without regard to case."""
        return _header(self._response, name)

    @property
    def length(self) -> int | None:
        """Bytes of the body, where the hub says so."""
        text = self.header("content-length") or ""
        return int(text) if text.isdecimal() and len(text) < 20 else None

    def pieces(self) -> Iterator[bytes]:
        """The body. Raises `HubAway` where it breaks off."""
        with _told():
            yield from self._response.iter_stream()


class HubConnection:
    """One hub, for one thread. `pause` is called twice a second while it waits, and may raise."""

    def __init__(
        self,
        place: HubPlace,
        pause: Callable[[], None] = lambda: None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._place = place
        self._pace = _Pace(pause, patience_seconds)
        self._backend = _Backend(place, self._pace)
        self._pool = httpcore2.ConnectionPool(
            ssl_context=httpcore2.default_ssl_context(), network_backend=self._backend, max_connections=4
        )

    def __enter__(self) -> HubConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def read(self, path: str, largest: int = LARGEST_LISTING) -> bytes:
        """A small answer. Raises ServiceError, `HubAway`."""
        found = bytearray()
        with self.get(path) as answer:
            for piece in answer.pieces():
                found += piece
                if len(found) > largest:
                    raise mismatch(f"an answer of more than {largest} bytes")
        return bytes(found)

    @contextmanager
    def get(self, path: str, offset: int = 0) -> Iterator[Answer]:
        """The answer to a path of the endpoint, from `offset` on if the hub can. Raises ServiceError for what
        will not change, `HubAway` for what may.
        """
        url, commit = self._place.endpoint + path, None
        for _ in range(MOST_REDIRECTS + 1):
            with self._once(url, offset) as response:
                commit = _header(response, "x-repo-commit") or commit
                if response.status in REDIRECTS:
                    url = _next(url, _header(response, "location") or "")
                    continue
                _require_fine(response, self._place, offset)
                yield Answer(response, commit)
                return
        raise mismatch(f"more than {MOST_REDIRECTS} redirects")

    @contextmanager
    def _once(self, url: str, offset: int) -> Iterator[httpcore2.Response]:
        try:
            destination = self._place.destination(url)
        except DestinationRefused as refused:
            raise mismatch(str(refused)) from None
        self._backend.expect(destination)
        self._pace.begin()
        with _told():
            stream = self._pool.stream("GET", _url(destination), headers=self._headers(destination, offset))
            with stream as response:
                yield response

    def _headers(self, destination: Destination, offset: int) -> list[tuple[str, str]]:
        headers = [
            ("host", destination.authority),
            ("user-agent", f"Bitplan/{version('bitplan')}"),
            ("accept-encoding", "identity"),
        ]
        if offset:
            headers.append(("range", f"bytes={offset}-"))
        if self._place.token and self._place.is_hub(destination):
            headers.append(("authorization", f"Bearer {self._place.token}"))
        return headers


def _next(url: str, location: str) -> str:
    """Where a redirect leads."""
    try:
        return urljoin(url, location)
    except ValueError:
        raise mismatch("a redirect to something that is no URL") from None


def _url(destination: Destination) -> httpcore2.URL:
    return httpcore2.URL(
        scheme=b"https" if destination.tls else b"http",
        host=destination.host.encode("ascii"),
        port=destination.port,
        target=destination.target.encode("ascii"),
    )


def _header(response: httpcore2.Response, name: str) -> str | None:
    wanted = name.encode()
    found = next((value for key, value in response.headers if key.lower() == wanted), None)
    return None if found is None else found.decode("latin-1")


def _require_fine(response: httpcore2.Response, place: HubPlace, offset: int) -> None:
    """Raise what the status says, unless it is that of a body."""
    status = response.status
    if status in BUSY:
        waits = _header(response, "retry-after") or ""
        seconds = min(float(waits), LONGEST_WAIT) if waits.isdecimal() and len(waits) < 6 else None
        raise HubAway(f"HTTP status {status}", seconds)
    if status in (401, 403, 404, 410, 451):
        raise _refused(status, _header(response, "x-error-code") or "", place)
    if status not in (200, 206) or (status == 206 and not _begins_at(response, offset)):
        raise mismatch(
            f"HTTP status {status}" + (" with other bytes than asked for" if status == 206 else "")
        )
    if (_header(response, "content-encoding") or "identity") != "identity":
        raise mismatch("an encoded body, which was not asked for")


def _begins_at(response: httpcore2.Response, offset: int) -> bool:
    return offset > 0 and (_header(response, "content-range") or "").startswith(f"bytes {offset}-")


def _refused(status: int, code: str, place: HubPlace) -> ServiceError:
    """The hub's own no; its words are not repeated, whoever wrote them."""
    key = "A token is set" if place.token else "No token is set: the operator may set BITPLAN_HUB_TOKEN_FILE"
    if status == 401:
        return Unauthorized(
            "hub-unauthorized",
            "The hub must give the files to this server. Got 401: the repository is private, or there is "
            f"none of that name. Check the name. {key}.",
            pointer="/hub/repository",
        )
    if status == 403 or code == "GatedRepo":
        return Forbidden(
            "hub-forbidden",
            "The hub must give the files to this server. Got 403: access to the repository is gated. Its "
            f"terms must be accepted on its page by the owner of the token. {key}.",
            pointer="/hub/repository",
        )
    what = {"RevisionNotFound": "no such commit", "EntryNotFound": "no such file"}.get(code, "not found")
    return NotFound(
        "hub-not-found",
        f"The repository must have this commit. Got {status} from the hub: {what}. Check owner/name and "
        "commit.",
        pointer="/hub",
    )


@contextmanager
def _told() -> Iterator[None]:
    """What breaks on the way, as `HubAway`, and where it must not go, as a problem."""
    try:
        yield
    except NameNotFound as unknown:
        raise HubAway(str(unknown)) from None
    except DestinationRefused:
        raise mismatch("a host whose address is not public") from None
    except httpcore2.TimeoutException as error:
        raise HubAway(str(error) or "no answer in time") from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        certificate = "CERTIFICATE" in str(error).upper()
        raise HubAway("the certificate was not accepted" if certificate else "a broken connection") from None


class _Pace:
    """Demands LEAST_BYTES in each `patience` since the question was asked."""

    def __init__(self, pause: Callable[[], None], patience_seconds: float) -> None:
        self.pause, self._patience = pause, patience_seconds
        self.begin()

    def begin(self) -> None:
        """A question is asked now."""
        self._until, self._bytes = time.monotonic() + self._patience, 0

    def count(self, size: int) -> None:
        """So much has come."""
        self._bytes += size
        if self._bytes >= LEAST_BYTES:
            self.begin()

    def left(self) -> float:
        """Seconds for the rest of LEAST_BYTES. Raises httpcore2's timeout when there are none."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise httpcore2.PoolTimeout(f"less than {LEAST_BYTES} bytes in {self._patience:g} seconds")
        return left


class _Backend(httpcore2.NetworkBackend):
    """Connects only where `expect` has said that a question goes, to checked addresses."""

    def __init__(self, place: HubPlace, pace: _Pace) -> None:
        self._place, self._pace, self._inner = place, pace, httpcore2.SyncBackend()
        self._expected: dict[tuple[str, int], Destination] = {}

    def expect(self, destination: Destination) -> None:
        """A question goes there."""
        self._expected[destination.host, destination.port] = destination

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Option] | None = None,
    ) -> httpcore2.NetworkStream:
        """A connection to the first address that takes one. Raises `DestinationRefused`, `NameNotFound`."""
        failure: Exception = httpcore2.ConnectError("no address")
        for address in self._place.addresses(self._expected[host, port])[:ADDRESSES]:
            self._pace.pause()
            try:
                stream = self._inner.connect_tcp(address, port, CONNECT_SECONDS, None, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _Paced(stream, self._pace)
        raise failure


class _Paced(httpcore2.NetworkStream):
    """A connection that keeps the pace, and can be left while it waits."""

    def __init__(self, stream: httpcore2.NetworkStream, pace: _Pace) -> None:
        self._stream, self._pace = stream, pace

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """As the stream, glance by glance."""
        while True:
            self._pace.pause()
            left = self._pace.left()
            try:
                found = self._stream.read(max_bytes, min(GLANCE_SECONDS, left))
            except httpcore2.ReadTimeout:
                continue
            self._pace.count(len(found))
            return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """As the stream; questions are short."""
        self._stream.write(buffer, CONNECT_SECONDS)

    def close(self) -> None:
        """Close it."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """The same connection with TLS."""
        return _Paced(self._stream.start_tls(ssl_context, server_hostname, CONNECT_SECONDS), self._pace)

    def get_extra_info(self, info: str) -> Any:
        """As the stream."""
        return self._stream.get_extra_info(info)
