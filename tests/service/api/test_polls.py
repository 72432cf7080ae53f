"""Polling: what "nothing new" costs, that it is true at the moment of the question, and whose it is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from service.access import Scope, new_key
from service.api.gathered import Gathered
from service.app import create_app
from service.db.repositories import keys


@contextmanager
def statements(api: Any) -> Iterator[list[str]]:
    """What the database is asked while the block runs, without the bounds of transactions."""
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            seen.append(statement)

    event.listen(api.context.database.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(api.context.database.engine, "before_cursor_execute", note)


def etag_of(api, job_id):
    return api.http.get(f"/v1/jobs/{job_id}").headers["ETag"]


def test_nothing_new_is_one_statement_that_reads_no_content(api):
    job = api.submit()
    headers = {"If-None-Match": etag_of(api, job["id"])}
    with statements(api) as asked:
        response = api.http.get(f"/v1/jobs/{job['id']}", headers=headers)
    assert (response.status_code, response.headers["ETag"]) == (304, headers["If-None-Match"])
    assert response.headers["Retry-After"] == "1"
    (statement,) = asked
    assert "summary" not in statement
    assert "request" not in statement


def test_something_new_is_two_statements(api, runner):
    job = api.submit()
    old = etag_of(api, job["id"])
    runner.start(job["id"])
    with statements(api) as asked:
        response = api.http.get(f"/v1/jobs/{job['id']}", headers={"If-None-Match": old})
    assert (response.status_code, response.json()["state"]) == (200, "running")
    assert len(asked) == 2


def test_an_end_is_told_without_when_to_ask_again(api, finished_job):
    headers = {"If-None-Match": f'W/"other", {etag_of(api, finished_job["id"])}'}
    response = api.http.get(f"/v1/jobs/{finished_job['id']}", headers=headers)
    assert response.status_code == 304
    assert "Retry-After" not in response.headers
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("ident", ["job_0", "%00", "job%20", "x" * 101, "%F0%9F%92%A9"])
def test_an_unknown_job_is_told_alike_with_and_without_an_etag(api, ident):
    plain = api.http.get(f"/v1/jobs/{ident}")
    assert plain.status_code in {404, 422}
    for etag in ('"a-1"', "*"):
        response = api.http.get(f"/v1/jobs/{ident}", headers={"If-None-Match": etag})
        assert (response.status_code, response.json()) == (plain.status_code, plain.json())


def test_another_tenants_job_is_unknown_whatever_etag_is_guessed(settings):
    with TestClient(create_app(settings)) as http:
        from service.db.repositories import jobs
        from service.states import JobKind

        made = {tenant: new_key() for tenant in ("mine", "theirs")}
        with http.app.state.context.database.write() as session:
            for tenant, key in made.items():
                given = {"tenant": tenant, "scope": Scope.READ, "prefix": key.prefix, "digest": key.digest}
                keys.create(session, name="k", **given)
            job = jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d", tenant="theirs")
        answers = {
            tenant: http.get(
                f"/v1/jobs/{job.id}",
                headers={"Authorization": f"Bearer {key.token}", "If-None-Match": f'"{job.id}-1"'},
            ).status_code
            for tenant, key in made.items()
        }
    assert answers == {"mine": 404, "theirs": 304}


def test_a_poll_counts_once_against_the_rate(settings):
    limited = settings.model_copy(update={"rate_limit": 0.001, "rate_burst": 2})
    key = new_key()
    with TestClient(create_app(limited)) as http:
        with http.app.state.context.database.write() as session:
            given = {"tenant": "mine", "scope": Scope.READ, "prefix": key.prefix, "digest": key.digest}
            keys.create(session, name="k", **given)
        headers = {"Authorization": f"Bearer {key.token}", "If-None-Match": '"job_1-1"'}
        statuses = [http.get("/v1/jobs/job_1", headers=headers).status_code for _ in range(3)]
    assert statuses == [404, 404, 429]


class Reads:
    """A reader that waits until it is let go on, and knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.go = threading.Semaphore(0)
        self.value = 0

    def __call__(self, idents: Sequence[str]) -> dict[str, int]:
        value = self.value
        self.asked.append(list(idents))
        assert self.go.acquire(timeout=60)
        if "bad" in idents:
            raise ValueError("told to all")
        return {ident: value for ident in idents if ident != "unknown"}


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def test_questions_that_come_meanwhile_are_asked_together_and_later() -> None:
    async def run() -> None:
        reads = Reads()
        gathered = Gathered(reads)
        first = asyncio.create_task(gathered.get("a"))
        await until(lambda: reads.asked)
        reads.value = 1
        others = [asyncio.create_task(gathered.get(name)) for name in ("a", "b", "b", "unknown")]
        await asyncio.sleep(0)
        reads.go.release(2)
        assert await first == 0
        assert await asyncio.gather(*others) == [1, 1, 1, None]
        assert reads.asked == [["a"], ["a", "b", "b", "unknown"]]
        gathered.close()

    asyncio.run(run())


def test_an_error_is_told_to_those_who_asked_and_the_next_are_answered() -> None:
    async def run() -> None:
        reads = Reads()
        reads.go.release(2)
        gathered = Gathered(reads)
        told = await asyncio.gather(gathered.get("a"), gathered.get("bad"), return_exceptions=True)
        assert [str(error) for error in told] == ["told to all"] * 2
        assert await gathered.get("a") == 0
        gathered.close()

    asyncio.run(run())


def test_who_has_left_is_not_waited_for() -> None:
    async def run() -> None:
        reads = Reads()
        gathered = Gathered(reads)
        gone, stays = (asyncio.create_task(gathered.get(name)) for name in ("a", "b"))
        await until(lambda: reads.asked)
        gone.cancel()
        reads.go.release()
        assert await stays == 0
        assert gone.cancelled()
        gathered.close()

    asyncio.run(run())


def test_a_page_is_one_statement_and_reads_no_inventory(api, finished_job):
    with statements(api) as asked:
        assert len(api.http.get("/v1/jobs").json()["items"]) == 1
    (statement,) = asked
    assert "inventory" not in statement
    with statements(api) as asked:
        assert api.http.get(f"/v1/jobs/{finished_job['id']}/scores?limit=5").json()["next_cursor"]
    assert [statement.partition("FROM ")[2].split()[0] for statement in asked] == ["jobs", "scores"]
