"""The benchmark of the service: what its client reads, what it fills, and that a small run comes to its end."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from service.app import open_context
from service.settings import Settings

ROOT = Path(__file__).parents[2]
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
UNCHANGED = b'HTTP/1.1 304 Not Modified\r\netag: "a-1"\r\n\r\n'


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


class Sent:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


@pytest.mark.parametrize(("answer", "status"), [(ANSWER, 200), (UNCHANGED, 304)])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_client_reads_answers_however_they_are_cut(answer: bytes, status: int, size: int) -> None:
    from benchmarks.load_client import Connection

    async def ask() -> None:
        connection = Connection()
        connection.connection_made(Sent())
        for _ in range(2):
            future = connection.ask(b"GET / HTTP/1.1\r\n\r\n")
            for start in range(0, len(answer), size):
                assert not future.done()
                connection.data_received(answer[start : start + size])
            assert await future == status

    asyncio.run(ask())


def test_the_client_says_what_it_cannot_read() -> None:
    from benchmarks.load_client import Connection

    async def ask() -> None:
        connection = Connection()
        connection.connection_made(Sent())
        future = connection.ask(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ValueError, match="must say its length"):
            connection.data_received(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.connection_lost(None)
        with pytest.raises(ConnectionError):
            await future

    asyncio.run(ask())


def test_the_database_is_filled_as_runners_leave_it(tmp_path: Path, empty_database_url: str) -> None:
    from benchmarks.load_rows import ROWS_PER_SET, TENANT, fill
    from service.db.repositories import events, jobs, scores

    context = open_context(Settings(data_dir=tmp_path / "data", database_url=empty_database_url))
    filled = fill(context, jobs=150, scores=2 * ROWS_PER_SET, clients=3)
    with context.database.read() as session:
        assert session.execute(text("select count(*) from scores")).scalar_one() == 2 * ROWS_PER_SET
        for target in filled.jobs:
            job = jobs.get(session, target.id, TENANT)
            assert job is not None
            assert (job.state, f'"{job.id}-{job.version}"') == (target.state, target.etag)
            assert events.list_after(session, job.id)[-1].type == job.state
        assert scores.count(session, str(job.score_set)) == ROWS_PER_SET
        page = scores.list_page(session, str(job.score_set), after=filled.score_keys[-2])
        assert [(row.layer, row.scheme, row.metric) for row in page] == [filled.score_keys[-1]]
    assert {job.state for job in filled.jobs} == {"running", "failed", "succeeded"}
    context.database.close()


@pytest.mark.slow
def test_a_small_run_measures_every_kind_of_request(tmp_path: Path) -> None:
    sizes = {"jobs": 200, "scores": 1000, "connections": 4, "seconds": 0.5, "rounds": 1, "rate": 100}
    options = [word for name, value in {**sizes, "streams": 20}.items() for word in (f"--{name}", str(value))]
    script, file = ROOT / "benchmarks" / "load.py", tmp_path / "table.json"
    command = [sys.executable, script, *options, "--json", file]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert all(row["rate"] > 0 and row["p50"] <= row["p99"] <= row["worst"] for row in rows)
    names = [row["requests"] for row in rows]
    assert names[:7] == ["bare", "poll", "poll, changed", "list", "scores", "re-solve", "submit"]
    assert {name.partition(" at ")[0] for name in names if "beside 20 streams" in name} >= {"poll", "submit"}
    assert rows[0]["bare"] == 1.0
