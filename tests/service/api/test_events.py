"""Server-sent events: replayed, followed to the end, bounded, and ended with the service."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest
import uvicorn

from service import metrics
from service.api import event_stream, watcher
from service.api.stopping import calling_at_stop
from service.app import create_app
from service.client import Client
from service.db.repositories import events, jobs
from service.states import JobKind

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def serving() -> Iterator[Callable[..., str]]:
    """serving(settings): the address of a real server of these settings, in a thread."""
    started = []

    def start(settings: Any) -> str:
        server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        started.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in started:
        server.should_exit = server.force_exit = True
        thread.join(30)


@pytest.fixture
def http(serving: Callable[..., str], settings: Any) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=serving(settings), timeout=30) as http:
        yield http


@pytest.fixture
def job(api: Any) -> dict[str, Any]:
    """A queued job, straight into the database."""
    with api.context.database.write() as session:
        made = jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d")
    return {"id": made.id}


@pytest.fixture
def ended(runner: Any, job: dict[str, Any]) -> dict[str, Any]:
    """A job that has succeeded, with four events."""
    runner.finish(runner.start(job["id"]))
    return job


def path_of(job: dict[str, Any]) -> str:
    return f"/v1/jobs/{job['id']}/events"


def listed(api: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    return list(api.http.get(path_of(job)).json()["items"])


def parsed(text: str) -> list[dict[str, str]]:
    """The fields of each block of a stream."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


def test_an_ended_job_is_replayed_and_the_stream_ends(api, ended):
    response = api.http.get(path_of(ended), headers=STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    hello, *blocks = parsed(response.text)
    assert hello == {"retry": "2000"}
    assert [json.loads(block["data"]) for block in blocks] == listed(api, ended)
    assert [int(block["id"]) for block in blocks] == list(range(1, len(blocks) + 1))
    assert [block["event"] for block in blocks][-1] == "succeeded"


def test_last_event_id_replays_what_is_behind_it(api, ended):
    every = listed(api, ended)
    response = api.http.get(path_of(ended), headers={**STREAM, "Last-Event-ID": "2"})
    assert [json.loads(block["data"]) for block in parsed(response.text)[1:]] == every[2:]
    for last in (len(every), 10**6):
        response = api.http.get(path_of(ended), headers={**STREAM, "Last-Event-ID": str(last)})
        assert (response.status_code, response.text) == (204, "")


@pytest.mark.parametrize("last", ["x", "-1", "1.5", str(2**63)])
def test_a_last_event_id_that_is_no_number_is_refused(api, ended, last):
    response = api.http.get(path_of(ended), headers={**STREAM, "Last-Event-ID": last})
    assert response.status_code == 422
    assert "Last-Event-ID must" in response.json()["detail"]


def test_an_unknown_job_is_no_stream(api):
    response = api.http.get("/v1/jobs/job_1/events", headers=STREAM)
    assert (response.status_code, response.json()["type"]) == (404, "urn:bitplan:problem:job-not-found")
    assert api.context.slots.open == 0


def test_more_events_than_the_shared_tail_come_from_the_database(api, job, runner, monkeypatch):
    held = runner.start(job["id"])
    with api.context.database.write() as session:
        for number in range(3 * watcher.TAIL):
            events.append(session, job["id"], "note", {"number": number})
    runner.finish(held)
    blocks = parsed(api.http.get(path_of(job), headers=STREAM).text)[1:]
    assert [int(block["id"]) for block in blocks] == list(range(1, len(blocks) + 1))
    assert len(blocks) > 3 * watcher.TAIL
    assert blocks[-1]["event"] == "succeeded"


def test_a_stream_follows_the_job_to_its_end(api, job, runner, http):
    seen = []
    with http.sse(path_of(job)) as stream:
        for event in stream:
            seen.append((event.event, event.id))
            if event.event == "progress" and json.loads(event.data)["state"] == "queued":
                held = runner.start(job["id"])
            if event.event == "progress" and json.loads(event.data)["state"] == "running":
                assert json.loads(event.data)["progress"] == {"done": 1, "total": 10, "eta_seconds": None}
                runner.finish(held)
    kinds = [kind for kind, _ in seen if kind not in {"progress", "message"}]
    assert kinds == ["queued", "running", "stage", "succeeded"]
    assert seen[-1] == ("succeeded", "4")


def test_a_quiet_stream_shows_signs_of_life(api, job, http, monkeypatch):
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", 0.05)
    with http.stream("GET", path_of(job), headers=STREAM) as response:
        lines = response.iter_lines()
        assert sum(line.startswith(":") for line in (next(lines) for _ in range(30))) >= 3


def test_a_deleted_job_ends_its_stream(api, job, runner, http):
    with http.sse(path_of(job)) as stream:
        for event in stream:
            if event.event == "progress":
                with api.context.database.write() as session:
                    session.execute(jobs.delete_from(jobs.JobRow).where(jobs.JobRow.id == job["id"]))
    assert api.http.get(path_of(job)).status_code == 404


def test_all_streams_share_one_look(api, job, runner, serving, settings, monkeypatch):
    """Statements are of the poller: their number does not grow with the streams."""
    with (
        httpx2.Client(base_url=serving(settings), timeout=30, limits=httpx2.Limits()) as http,
        ExitStack() as stack,
    ):
        streams = [iter(stack.enter_context(http.sse(path_of(job)))) for _ in range(20)]
        for stream in streams:
            assert [next(stream).event for _ in range(3)] == ["message", "queued", "progress"]
        read = []
        monkeypatch.setattr(
            watcher, "frame_of", lambda event, make=watcher.frame_of: read.append(1) or make(event)
        )
        monkeypatch.setattr(event_stream.events, "list_after", pytest.fail)
        runner.finish(runner.start(job["id"]))
        for stream in streams:
            assert [event.event for event in stream][-1] == "succeeded"
    assert len(read) == 3


def test_streams_are_limited_for_each_client_and_in_all(api, job, serving, settings):
    for limits, words in (
        ({"max_streams_per_client": 2}, "A client must have at most 2 open"),
        ({"max_streams": 2}, "The service must have at most 2 open"),
    ):
        base_url = serving(settings.model_copy(update=limits))
        with httpx2.Client(base_url=base_url, timeout=30) as http:
            with http.sse(path_of(job)), http.sse(path_of(job)):
                refused = http.get(path_of(job), headers=STREAM)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
                assert metrics.API.get_sample_value("bitplan_event_streams") >= 2
                assert refused.json()["type"] == "urn:bitplan:problem:too-many-streams"
                assert words in refused.json()["detail"]
                assert http.get(path_of(job)).status_code == 200
            until(lambda: opened(http, job), "a closed stream gives its slot back")


def opened(http: httpx2.Client, job: dict[str, Any]) -> bool:
    with http.stream("GET", path_of(job), headers=STREAM) as response:
        return bool(response.status_code == 200)


def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_client_that_never_reads_costs_a_cursor(api, job, runner, monkeypatch):
    """Nothing is read for it beyond what it was sent, and others are not held up."""
    held = runner.start(job["id"])
    with api.context.database.write() as session:
        for _ in range(200):
            events.append(session, job["id"], "note", {"text": "x" * 1000})
    runner.finish(held)
    pages = []
    list_after = events.list_after
    monkeypatch.setattr(
        event_stream.events, "list_after", lambda *rest: pages.append(rest[2]) or list_after(*rest)
    )
    asyncio.run(blocked_after(api, path_of(job), 5))
    assert pages == [0]
    assert api.context.slots.open == 0


async def blocked_after(api: Any, path: str, most: int) -> None:
    """Ask for a stream, take `most` parts of it, never another one, and go away while another client reads."""
    taken: list[bytes] = []
    full, gone = asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            taken.append(message["body"])
            if len(taken) == most:
                full.set()
                await asyncio.Event().wait()

    stuck = asyncio.create_task(api.http.app(scope_of(api, path), receive, send))
    await full.wait()
    assert api.context.slots.open == 1
    await asyncio.sleep(3 * watcher.POLL_SECONDS)
    assert len(taken) == most
    gone.set()
    await stuck


def scope_of(api: Any, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"accept", b"text/event-stream"), (b"host", b"localhost")],
        "server": ("testserver", 80),
        "client": ("127.0.0.1", 1),
        "app": api.http.app,
        "state": {},
    }


def test_a_socket_that_never_reads_does_not_hold_up_the_others(api, job, runner, http):
    held = runner.start(job["id"])
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    deaf.connect((http.base_url.host, http.base_url.port))
    deaf.sendall(f"GET {path_of(job)} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n".encode())
    with api.context.database.write() as session:
        for _ in range(300):
            events.append(session, job["id"], "note", {"text": "x" * 10_000})
    runner.finish(held)
    with http.sse(path_of(job)) as stream:
        assert [event.event for event in stream][-1] == "succeeded"
    deaf.close()


def test_a_database_that_is_away_ends_no_stream(api, job, runner, http, monkeypatch):
    with http.sse(path_of(job)) as stream:
        feed = iter(stream)
        assert [next(feed).event for _ in range(3)] == ["message", "queued", "progress"]
        failed = threading.Event()
        standings = jobs.standings

        def fail_once(*rest: Any) -> Any:
            if not failed.is_set():
                failed.set()
                raise jobs.JobNotFinished("away")
            return standings(*rest)

        monkeypatch.setattr(jobs, "standings", fail_once)
        assert failed.wait(30)
        runner.finish(runner.start(job["id"]))
        assert [event.event for event in feed][-1] == "succeeded"


def test_streams_and_waits_end_when_the_process_is_to_stop(api, job, serving, settings):
    application = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, "the server starts")
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with httpx2.Client(base_url=address, timeout=30) as http, http.sse(path_of(job)) as stream:
        feed = iter(stream)
        assert next(feed).event == "message"
        context = application.state.context
        threading.Timer(0.2, context.watcher.close).start()
        waited = http.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=30"})
        assert waited.json()["state"] == "queued"
        assert [event.event for event in feed][-1] in {"queued", "progress"}
        refused = http.get(path_of(job), headers=STREAM)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def test_a_signal_is_heard_before_the_server_waits_for_its_answers():
    """The server's own handler still gets it, and is the handler again afterwards."""
    heard = []

    async def serve() -> None:
        told = asyncio.Event()
        with calling_at_stop(told.set):
            signal.raise_signal(signal.SIGTERM)
            await asyncio.wait_for(told.wait(), 10)

    def own(number: int, frame: object) -> None:
        heard.append(number)

    former = signal.signal(signal.SIGTERM, own)
    try:
        asyncio.run(serve())
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, former)
    assert heard == [signal.SIGTERM]


def test_waiting_without_an_etag_is_for_the_end(api, job, runner):
    held = runner.start(job["id"])
    timer = threading.Timer(0.3, runner.finish, [held])
    timer.start()
    response = api.http.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=20"})
    timer.join()
    assert response.json()["state"] == "succeeded"


def test_waiting_ends_after_its_time(api, job):
    path = f"/v1/jobs/{job['id']}"
    etag = api.http.get(path).headers["ETag"]
    waited = api.http.get(path, headers={"Prefer": "wait=1", "If-None-Match": etag})
    assert waited.status_code == 304


def test_the_client_follows_a_real_server(api, job, runner, http):
    client = Client(http=http)
    states: list[tuple[str, int]] = []
    held = []

    def seen(resource: Any) -> None:
        states.append((resource["state"], resource["progress"]["total"]))
        if not held:
            held.append(runner.start(job["id"]))
        elif resource["progress"]["total"] == 10 and resource["state"] == "running":
            runner.finish(held[0])

    handle = client.job(job["id"])
    assert handle.wait(on_progress=seen).state == "succeeded"
    assert states[0] == ("queued", 0)
    assert ("running", 10) in states
    assert states[-1] == ("succeeded", 10)
    assert [event["type"] for event in handle.follow(after=1)] == ["running", "stage", "succeeded"]


def test_a_stream_ends_after_a_while_for_its_client_to_come_again(api, job, runner, http, monkeypatch):
    monkeypatch.setattr(event_stream, "LONGEST_SECONDS", -1.0)
    assert parsed(api.http.get(path_of(job), headers=STREAM).text) == [{"retry": "2000"}]
    monkeypatch.setattr(event_stream, "LONGEST_SECONDS", 0.1)
    timer = threading.Timer(0.5, lambda: runner.finish(runner.start(job["id"])))
    timer.start()
    assert Client(http=http).job(job["id"]).wait().state == "succeeded"
    timer.join()
