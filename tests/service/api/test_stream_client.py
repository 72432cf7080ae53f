"""The client's way to follow a job: streams that break, are refused, or are not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from service.client import Client
from service.remote.stream import NoStream, messages
from service.remote.transport import ConnectionFailed, ProblemError

JOB = {"id": "job_1", "state": "running", "stage": None, "progress": {}, "request": {}}


def event(seq: int, kind: str) -> bytes:
    body = json.dumps({"seq": seq, "type": kind, "data": {}})
    return f"event: {kind}\ndata: {body}\nid: {seq}\n\n".encode()


def progress(done: int) -> bytes:
    body = {"state": "running", "stage": "scoring", "progress": {"done": done, "total": 3}}
    return f"event: progress\ndata: {json.dumps(body)}\n\n".encode()


def stream(*blocks: bytes, cut: bool = False) -> httpx2.Response:
    def content() -> Iterator[bytes]:
        yield b"retry: 2000\n\n"
        yield from blocks
        if cut:
            raise httpx2.ReadError("cut")

    return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=content())


class Server:
    """Answers stream requests with what is on its list, and others with the job."""

    def __init__(self) -> None:
        self.streams: list[httpx2.Response] = []
        self.state = "running"
        self.version = 1
        self.asked: list[httpx2.Request] = []
        self.polls = 0

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/events"):
            self.asked.append(request)
            if not self.streams:
                raise httpx2.ConnectError("no server")
            answer = self.streams.pop(0)
            if not self.streams:
                self.state, self.version = "succeeded", self.version + 1
            return answer
        self.polls += 1
        etag = f'"{self.version}"'
        if request.headers.get("If-None-Match") == etag:
            return httpx2.Response(304, headers={"ETag": etag})
        return httpx2.Response(200, headers={"ETag": etag}, json={**JOB, "state": self.state})


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    http = httpx2.Client(transport=httpx2.MockTransport(server), base_url="http://testserver")
    with Client(http=http, retries=3) as client:
        client.transport.pause = lambda seconds: None
        yield client


def said(client: Client, after: int = 0) -> list[int | None]:
    return [message.seq for message in messages(client.transport, "/v1/jobs/job_1/events", after)]


def test_a_cut_stream_goes_on_behind_the_last_event(client, server):
    server.streams = [
        stream(event(1, "queued"), event(2, "running"), cut=True),
        stream(progress(1), event(3, "stage")),
        httpx2.Response(503, headers={"Retry-After": "2"}),
        stream(event(4, "succeeded"), event(5, "never")),
    ]
    assert said(client) == [1, 2, None, 3, 4]
    assert [request.headers.get("Last-Event-ID") for request in server.asked] == [None, "2", "3", "3"]
    assert {request.headers["Accept"] for request in server.asked} == {"text/event-stream"}


def test_the_pauses_are_the_servers_or_grow(client, server):
    pauses = []
    client.transport.pause = pauses.append
    server.streams = [
        httpx2.Response(503, headers={"Retry-After": "7"}),
        stream(),
        stream(event(1, "failed")),
    ]
    said(client)
    assert pauses == [7.0, 0.5]


def test_nothing_new_of_a_job_that_has_ended(client, server):
    server.streams = [httpx2.Response(204)]
    assert said(client, after=4) == []


def test_a_server_that_stays_away_is_told(client, server):
    with pytest.raises(ConnectionFailed, match="The Bitplan server must be reachable"):
        said(client)
    assert len(server.asked) == 4
    server.streams = [stream() for _ in range(4)]
    with pytest.raises(ConnectionFailed, match="the stream ended before the job"):
        said(client)


def test_a_problem_is_raised(client, server):
    server.streams = [httpx2.Response(404, json={"type": "urn:bitplan:problem:job-not-found"})]
    with pytest.raises(ProblemError) as caught:
        said(client)
    assert caught.value.slug == "job-not-found"


REFUSALS: tuple[Callable[[], httpx2.Response], ...] = (
    lambda: httpx2.Response(429, headers={"Retry-After": "10"}, json={}),
    lambda: httpx2.Response(200, json={"items": []}),
)


@pytest.mark.parametrize("refused", REFUSALS, ids=["busy", "old server"])
def test_without_a_stream_the_job_is_asked_for(client, server, refused):
    server.streams = [refused()]
    assert client.job("job_1").wait().state == "succeeded"
    server.streams, server.state = [refused()], "running"
    with pytest.raises(NoStream):
        list(client.job("job_1").follow())


def test_waiting_tells_of_every_change_with_few_requests(client, server):
    server.streams = [stream(event(1, "running"), progress(1), progress(2)), stream(event(2, "succeeded"))]
    seen: list[Any] = []
    job = client.job("job_1")
    server.polls = 0
    job.wait(on_progress=lambda job: seen.append((job["state"], job["progress"].get("done"))))
    assert seen == [("running", None), ("running", 1), ("running", 2), ("succeeded", None)]
    assert server.polls <= 4


def test_events_are_followed_without_progress(client, server):
    server.streams = [stream(event(1, "queued"), progress(1), event(2, "succeeded"))]
    assert [one["seq"] for one in client.job("job_1").follow()] == [1, 2]
