"""The client of `benchmarks/load.py`, a process of its own: kept connections, answers read by hand.

    python benchmarks/load_client.py < task.json > result.json

The task says where the server is, the requests of each kind as text, and how to send them:

- without `rates`, closed: each of `connections` sends the next request when its answer is there;
- with `rates`, open: requests arrive by chance (Poisson) at so many per second and kind, whether or not the
  ones before were answered. A request that finds no free connection waits for one, and its latency is counted
  from its arrival.

`streams` open event streams stay open meanwhile; the first `deaf` of them never read.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import sys
import time
from collections import Counter, deque
from itertools import accumulate
from typing import Any

STREAM_START_SECONDS = 60
DRAIN_SECONDS = 10
"""How long answers may take after the last arrival; then they count as given now, and as unanswered."""
RECEIVE_BUFFER = 4096


class Connection(asyncio.Protocol):
    """One request at a time; `future` gets the status once the answer is whole."""

    def __init__(self) -> None:
        self.future: asyncio.Future[int] | None = None
        self._buffer = b""
        self._wanted = -1
        self._status = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[int]:
        self.future = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.future

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if self._wanted < 0:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = buffer
                return
            self._status = int(buffer[9:12])
            self._wanted = end + 4 + _length(buffer[:end], self._status)
        if len(buffer) < self._wanted:
            self._buffer = buffer
            return
        self._buffer, self._wanted = b"", -1
        future, self.future = self.future, None
        if future is not None and not future.done():
            future.set_result(self._status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_exception(ConnectionError("the server closed the connection"))


def _length(head: bytes, status: int) -> int:
    """Bytes of the body."""
    if status in (204, 304):
        return 0
    start = head.lower().find(b"content-length: ")
    if start < 0:
        raise ValueError(f"An answer must say its length. Got {head!r}.")
    return int(head[start + 16 :].partition(b"\r\n")[0])


class Stream(asyncio.Protocol):
    """An open event stream: counts the bytes that come, or reads none at all."""

    def __init__(self, request: bytes, *, deaf: bool) -> None:
        self._request, self._deaf = request, deaf
        self.begun: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.received = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._request)
        if self._deaf:
            transport.pause_reading()
            self.begun.set_result(b"")

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if not self.begun.done():
            self.begun.set_result(data[:12])


class Log:
    """Latencies in seconds and statuses, by kind; `elapsed` seconds from the warm-up to the last answer."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.statuses: Counter[str] = Counter()
        self.sent = 0
        self.elapsed = 0.0
        self.unanswered = 0

    def note(self, kind: str, status: int, seconds: float) -> None:
        self.seconds.setdefault(kind, []).append(seconds)
        self.statuses[f"{kind} {status}"] += 1


async def main(task: dict[str, Any]) -> dict[str, Any]:
    requests = {kind: [text.encode() for text in texts] for kind, texts in task["requests"].items()}
    opened = await _open_streams(task)
    loop = asyncio.get_running_loop()
    connections = []
    for _ in range(task["connections"]):
        _, connection = await loop.create_connection(Connection, task["host"], task["port"])
        connections.append(connection)
    log, began = Log(), time.perf_counter()
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    late = (
        await _open_loop(task, requests, connections, log)
        if task.get("rates")
        else await _closed_loop(task, requests, connections, log)
    )
    wall = time.perf_counter() - began
    return {
        "seconds": log.seconds,
        "statuses": log.statuses,
        "sent": log.sent,
        "elapsed": log.elapsed,
        "wall": wall,
        "late": late,
        "unanswered": log.unanswered,
        "busy": (sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used) / wall,
        "stream_bytes": sum(stream.received for stream in opened),
    }


async def _closed_loop(
    task: dict[str, Any], requests: dict[str, list[bytes]], connections: list[Connection], log: Log
) -> float:
    """Requests of one kind, as fast as answers come; those of the warm-up are not noted."""
    ((kind, texts),) = requests.items()
    begin = time.perf_counter() + task["warmup"]
    end = begin + task["seconds"]
    choose = random.Random(task["seed"])  # noqa: S311 - no secret

    async def client(connection: Connection) -> None:
        while (sent := time.perf_counter()) < end:
            log.sent += 1
            status = await connection.ask(texts[choose.randrange(len(texts))])
            if (now := time.perf_counter()) >= begin:
                log.note(kind, status, now - sent)

    await asyncio.gather(*(client(connection) for connection in connections))
    log.elapsed = time.perf_counter() - begin
    return 0.0


async def _open_loop(
    task: dict[str, Any], requests: dict[str, list[bytes]], connections: list[Connection], log: Log
) -> float:
    """Requests at their own times; gives how late this process itself was, at the 99th percentile."""
    choose = random.Random(task["seed"])  # noqa: S311 - no secret
    kinds, rates = list(task["rates"]), list(task["rates"].values())
    bounds = list(accumulate(rates))
    free, waiting = deque(connections), deque[tuple[float, str, bytes]]()
    begin = time.perf_counter() + task["warmup"]
    end, due, late = begin + task["seconds"], time.perf_counter(), []
    senders: set[asyncio.Future[None]] = set()
    unanswered: dict[Connection, tuple[float, str]] = {}

    async def send(connection: Connection, due: float, kind: str, request: bytes) -> None:
        while True:
            log.sent += 1
            unanswered[connection] = (due, kind)
            status = await connection.ask(request)
            del unanswered[connection]
            if due >= begin:
                log.note(kind, status, time.perf_counter() - due)
            if not waiting:
                free.append(connection)
                return
            due, kind, request = waiting.popleft()

    while due < end:
        pause = due - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        late.append(time.perf_counter() - due)
        kind = choose.choices(kinds, cum_weights=bounds)[0]
        request = requests[kind][choose.randrange(len(requests[kind]))]
        if free:
            in_turn = free.popleft()  # the server closes what is idle for 5 s
            sender = asyncio.ensure_future(send(in_turn, due, kind, request))
            senders.add(sender)
            sender.add_done_callback(senders.discard)
        else:
            waiting.append((due, kind, request))
        due += choose.expovariate(bounds[-1])
    if senders:
        await asyncio.wait(senders, timeout=DRAIN_SECONDS)
    now = time.perf_counter()
    log.elapsed = now - begin
    for due, kind in (*unanswered.values(), *((due, kind) for due, kind, _ in waiting)):
        log.unanswered += 1
        if due >= begin:
            log.seconds.setdefault(kind, []).append(now - due)
    return sorted(late)[int(0.99 * len(late))]


async def _open_streams(task: dict[str, Any]) -> list[Stream]:
    """Streams that are open once the first bytes of each are there."""
    loop, opened = asyncio.get_running_loop(), []
    for number, text in enumerate(task.get("streams", ())):
        deaf = number < task.get("deaf", 0)
        wire = socket.create_connection((task["host"], task["port"]))
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        wire.setblocking(False)
        _, stream = await loop.create_connection(lambda t=text, d=deaf: Stream(t.encode(), deaf=d), sock=wire)
        opened.append(stream)
    begun = await asyncio.wait_for(asyncio.gather(*(stream.begun for stream in opened)), STREAM_START_SECONDS)
    refused = [data for data in begun if data and not data.endswith(b" 200")]
    if refused:
        raise ValueError(f"A stream must be answered 200. Got {refused[0]!r}.")
    return opened


if __name__ == "__main__":
    json.dump(asyncio.run(main(json.load(sys.stdin))), sys.stdout)
