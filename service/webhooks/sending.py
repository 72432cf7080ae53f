"""One attempt to deliver a message: one POST to a checked address, no redirect, no proxy, one deadline."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import httpcore2

from service.webhooks.guard import Destination, DestinationRefused, Guard, NameNotFound, parse_destination
from service.webhooks.signing import signature

TIMEOUT_SECONDS = 15.0
GONE = 410
ADDRESSES = 3
"""At most so many addresses of a name are tried."""

Option = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt: the receiver's HTTP status, and what was wrong; `final`: do not try again."""

    status: int | None
    error: str | None = None
    final: bool = False

    @property
    def delivered(self) -> bool:
        """Whether the receiver has taken the message."""
        return self.error is None


@dataclass(frozen=True)
class Message:
    """What is to be sent: `id` is the same at each attempt."""

    id: str
    url: str
    secret: str
    content: Mapping[str, Any]


class Sender:
    """Sends messages where `guard` lets them go."""

    def __init__(self, guard: Guard, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._guard, self._timeout = guard, timeout_seconds
        self._tls = httpcore2.default_ssl_context()

    def send(self, message: Message) -> Outcome:
        """Send it once. The receiver's answer counts by its status alone; its body is not read."""
        try:
            return _outcome(self._status(message))
        except DestinationRefused as refused:
            return Outcome(None, f"blocked: {refused}", final=True)
        except NameNotFound as unknown:
            return Outcome(None, str(unknown))
        except httpcore2.TimeoutException:
            return Outcome(None, f"no answer within {self._timeout:g} s")
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            certificate = "CERTIFICATE" in str(error).upper()
            return Outcome(None, "the certificate was not accepted" if certificate else "no connection")

    def _status(self, message: Message) -> int:
        destination = parse_destination(message.url)
        url = httpcore2.URL(
            scheme=b"https" if destination.tls else b"http",
            host=destination.host.encode("ascii"),
            port=destination.port,
            target=destination.target.encode("ascii"),
        )
        body = json.dumps(message.content, allow_nan=False, separators=(",", ":")).encode()
        headers = _headers(message, destination, body)
        backend = _Checked(self._guard, destination, time.monotonic() + self._timeout)
        with (
            httpcore2.ConnectionPool(ssl_context=self._tls, network_backend=backend) as pool,
            pool.stream("POST", url, headers=headers, content=body) as response,
        ):
            return int(response.status)


def _outcome(status: int) -> Outcome:
    if 200 <= status < 300:
        return Outcome(status)
    if 300 <= status < 400:
        return Outcome(status, f"HTTP status {status}: redirects are not followed")
    return Outcome(status, f"HTTP status {status}", final=status == GONE)


def _headers(message: Message, destination: Destination, body: bytes) -> list[tuple[str, str]]:
    timestamp = int(time.time())
    return [
        ("host", destination.authority),
        ("content-type", "application/json"),
        ("user-agent", f"Bitplan/{version('bitplan')}"),
        ("connection", "close"),
        ("webhook-id", message.id),
        ("webhook-timestamp", str(timestamp)),
        ("webhook-signature", signature(message.secret, message.id, timestamp, body)),
    ]


class _Checked(httpcore2.NetworkBackend):
    """Connects to the addresses that the guard has checked, whatever the name says afterwards."""

    def __init__(self, guard: Guard, destination: Destination, deadline: float) -> None:
        self._guard, self._destination, self._deadline = guard, destination, deadline
        self._inner = httpcore2.SyncBackend()

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
        for address in self._guard.addresses(self._destination)[:ADDRESSES]:
            try:
                stream = self._inner.connect_tcp(address, port, _left(self._deadline), None, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _Hurried(stream, self._deadline)
        raise failure


class _Hurried(httpcore2.NetworkStream):
    """A connection whose every step must be over by one deadline: a receiver that drips is cut off."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """As the stream, in the time that is left."""
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """As the stream, in the time that is left."""
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        """Close it."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """The same connection with TLS, whose handshake has the time that is left."""
        stream = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _Hurried(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """As the stream."""
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    """Seconds until the deadline. Raises httpcore2's timeout when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("the deadline has passed")
    return left
