"""What one API process bears: pollers, lists, pages, re-solves, submitters and event streams, over HTTP.

    python benchmarks/load.py [--postgres postgresql://user:password@host/any]
                              [--jobs 10000] [--scores 1000000] [--connections 32]
                              [--seconds 4] [--rounds 3] [--rate 200] [--streams 1000]
                              [--only saturation,rates,streams] [--json FILE]

A database of so many jobs and scores is filled in bulk, in a temporary data directory and, with --postgres,
in a database of its own that is dropped again. The server is `python -m service.serve api`, authentication
on, rate limits and quotas counted but too large to be met, its log in a file; beside it a bare FastAPI route
runs under the same uvicorn settings. The client is one process that reads answers by hand
(`benchmarks/load_client.py`). Servers and client are pinned to a core each where the machine has two.

- Saturation: each connection asks again as soon as it is answered. Polls and the bare route take turns.
- Fixed rates: requests arrive by chance, answered or not; latency counts from the arrival, so a server that
  stalls is charged for all who came meanwhile. With event streams open and with submitters.

`busy` is the share of a core that the server used: a saturated server with less was not given its core, or
waited for the database; `CPU us` is what it used per request. Any status but the expected one ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import create_engine, make_url, text

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.load_rows import ROWS_PER_SET, Filled, fill
from service.api.cursors import Cursors
from service.app import open_context
from service.settings import Settings

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "bare": 200,
    "poll": 304,
    "poll, changed": 200,
    "list": 200,
    "scores": 200,
    "re-solve": 201,
    "submit": 202,
}
REQUESTS = 2000
"""Different requests of each kind that a client chooses from."""
CLIENTS, STREAMED_JOBS = 16, 100
WARMUP_SECONDS, START_SECONDS = 1.0, 120.0
SERVER_CORE, CLIENT_CORE = 0, 1
COLUMNS = "{:<11} {:<28} {:>10} {:>9} {:>9} {:>9} {:>7} {:>8} {:>7}"
HEAD = ("database", "requests", "per second", "p50 ms", "p99 ms", "worst ms", "busy", "CPU us", "bare")


@dataclass(frozen=True)
class Row:
    """One line of the table. Latencies in milliseconds; `bare` is the rate beside the bare route's."""

    database: str
    requests: str
    mode: str
    rate: float
    p50: float
    p99: float
    worst: float
    busy: float
    processor_us: float | None
    bare: float | None = None

    def shown(self) -> str:
        used = "" if self.processor_us is None else f"{self.processor_us:.0f}"
        bare = "" if self.bare is None else f"{self.bare:.2f}"
        times = (f"{value:.1f}" for value in (self.p50, self.p99, self.worst))
        return COLUMNS.format(
            self.database, self.requests, f"{self.rate:.0f}", *times, f"{self.busy:.2f}", used, bare
        )


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    port: int
    pid: int

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    options = _options()
    facts = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: getattr(options, name) for name in ("jobs", "scores", "connections", "rate", "streams")},
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()), f", load {os.getloadavg()[0]:.1f}")
    print(COLUMNS.format(*HEAD), flush=True)
    rows: list[Row] = []
    for database in ("sqlite", *(["postgresql"] if options.postgres else [])):
        with ExitStack() as stack:
            for row in _measure(database, options, stack):
                print(row.shown(), flush=True)
                rows.append(row)
    if options.json:
        Path(options.json).write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--postgres", help="a server whose user may create databases")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--scores", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the bare route and polls")
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second of the open loop")
    parser.add_argument("--streams", type=int, default=1000, help="open event streams, a tenth never read")
    parser.add_argument("--only", default="saturation,rates,streams")
    parser.add_argument("--json", help="write the table to this file, too")
    return parser.parse_args()


def _measure(database: str, options: argparse.Namespace, stack: ExitStack) -> Iterator[Row]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    url = stack.enter_context(_own_database(options.postgres)) if database == "postgresql" else ""
    settings = Settings(
        data_dir=folder / "data",
        database_url=url,
        access="keys",
        rate_limit=1e6,
        rate_burst=1_000_000,
        quota_jobs=10**9,
        max_streams_per_client=10_000,
        max_streams=10_000,
    )
    began, context = time.perf_counter(), open_context(settings)
    filled = fill(context, options.jobs, options.scores, CLIENTS)
    requests = _requests(filled, context.cursors)
    context.database.close()
    print(f"filled {database} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    ours = stack.enter_context(_server(settings, "service.serve", "api"))
    bare = stack.enter_context(_server(settings, "benchmarks.load_bare"))
    parts = options.only.split(",")
    if "saturation" in parts:
        yield from _saturated(database, ours, bare, requests, options)
    if "rates" in parts:
        yield from _at_fixed_rates(database, ours, requests, options)
    if "streams" in parts:
        yield from _with_streams(database, ours, filled, requests, options)


def _saturated(
    database: str, ours: Server, bare: Server, requests: Mapping[str, list[str]], options: argparse.Namespace
) -> Iterator[Row]:
    """The bare route and polls in turns, the middle of the rounds of each; then everything else, once."""
    turns: dict[str, list[Row]] = {}
    for number in range(options.rounds):
        for kind in ("bare", "poll", "poll, changed"):
            server = bare if kind == "bare" else ours
            turns.setdefault(kind, []).append(
                _closed(database, server, kind, requests[kind], options, seed=number)
            )
    middle = {kind: sorted(rows, key=lambda row: row.rate)[len(rows) // 2] for kind, rows in turns.items()}
    rest = {
        kind: _closed(database, ours, kind, requests[kind], options)
        for kind in ("list", "scores", "re-solve", "submit")
    }
    for row in (middle | rest).values():
        yield Row(**{**asdict(row), "bare": row.rate / middle["bare"].rate})


def _closed(
    database: str, server: Server, kind: str, texts: Sequence[str], options: argparse.Namespace, seed: int = 0
) -> Row:
    task = {"requests": {kind: texts}, "connections": options.connections, "seconds": options.seconds}
    used = server.processor_seconds()
    result = _client(server, {**task, "seed": seed})
    used = server.processor_seconds() - used
    milliseconds = 1e3 * np.array(result["seconds"][kind])
    return Row(
        database,
        kind,
        f"{options.connections} connections",
        len(milliseconds) / result["elapsed"],
        *_latencies(milliseconds),
        used / result["wall"],
        1e6 * used / result["sent"],
    )


def _at_fixed_rates(
    database: str, ours: Server, requests: Mapping[str, list[str]], options: argparse.Namespace
) -> Iterator[Row]:
    """Polls alone, pages alone, and what a busy day looks like, each at the same number per second."""
    rate = options.rate
    for mix in (
        {"poll": rate},
        {"list": rate / 2, "scores": rate / 2},
        {"poll": 0.6 * rate, "poll, changed": 0.2 * rate, "list": 0.1 * rate, "scores": 0.1 * rate},
    ):
        yield from _opened(database, ours, mix, requests, options)


def _with_streams(
    database: str,
    ours: Server,
    filled: Filled,
    requests: Mapping[str, list[str]],
    options: argparse.Namespace,
) -> Iterator[Row]:
    """The same beside event streams and submitters, and what a stream costs in memory."""
    running = [job for job in filled.jobs if not job.finished][:STREAMED_JOBS]
    accept = {"Accept": "text/event-stream"}
    streams = [
        _get(f"/v1/jobs/{running[number % len(running)].id}/events", filled, number, accept)
        for number in range(options.streams)
    ]
    rate, before = options.rate, ours.resident_bytes()
    mix = {"poll": 0.75 * rate, "list": 0.1 * rate, "scores": 0.1 * rate, "submit": 0.04 * rate}
    mix["re-solve"] = 0.01 * rate
    extra = {"streams": streams, "deaf": options.streams // 10}
    yield from _opened(database, ours, mix, requests, options, extra)
    each = (ours.resident_bytes() - before) / 1024 / max(1, options.streams)
    print(f"resident memory grew by {each:.0f} KiB per stream, submissions included", file=sys.stderr)


def _opened(
    database: str,
    ours: Server,
    mix: Mapping[str, float],
    requests: Mapping[str, list[str]],
    options: argparse.Namespace,
    extra: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    task = {
        "requests": {kind: requests[kind] for kind in mix},
        "rates": mix,
        "connections": 2 * options.connections,
        "seconds": 3 * options.seconds,
        "seed": 0,
    }
    used = ours.processor_seconds()
    result = _client(ours, {**task, **(extra or {})})
    busy = (ours.processor_seconds() - used) / result["wall"]
    title = f" beside {len(extra['streams'])} streams" if extra else ""
    for kind in (kind for kind in mix if kind in result["seconds"]):
        milliseconds = 1e3 * np.array(result["seconds"][kind])
        name = f"{kind} at {mix[kind]:.0f}/s{title}"
        rate = len(milliseconds) / result["elapsed"]
        yield Row(database, name, f"open, {len(mix)} kinds", rate, *_latencies(milliseconds), busy, None)
    if result["unanswered"]:
        print(f"{result['unanswered']} requests were not answered at all", file=sys.stderr)
    if result["late"] > 0.01:
        print(f"the client itself was {1e3 * result['late']:.0f} ms late: a busy machine", file=sys.stderr)


def _latencies(milliseconds: Any) -> tuple[float, float, float]:
    median, slow = np.quantile(milliseconds, [0.5, 0.99])
    return float(median), float(slow), float(milliseconds.max())


def _client(server: Server, task: Mapping[str, Any]) -> dict[str, Any]:
    """Run one task in a client process; raises where an answer was not the expected one."""
    whole = {"host": "127.0.0.1", "port": server.port, "warmup": WARMUP_SECONDS, **task}
    script = str(ROOT / "benchmarks" / "load_client.py")
    process = _started(CLIENT_CORE, script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    answer, _ = process.communicate(json.dumps(whole).encode())
    if process.returncode:
        raise SystemExit("The client must come to its end. Got the failure above.")
    result: dict[str, Any] = json.loads(answer)
    wrong = {
        name: count
        for name, count in result["statuses"].items()
        if name.rpartition(" ")[2] != str(EXPECTED[name.rpartition(" ")[0]])
    }
    if wrong:
        raise SystemExit(f"Answers must have the status {EXPECTED}. Got {wrong}. See the log of the server.")
    return result


def _requests(filled: Filled, cursors: Cursors) -> dict[str, list[str]]:
    """Requests of every kind, as text, each of another client and about another job."""
    choose = random.Random(0)  # noqa: S311 - no secret
    jobs = choose.choices(filled.jobs, k=REQUESTS)
    planned = [job for job in filled.jobs if job.succeeded][:4]
    found: dict[str, list[str]] = {kind: [] for kind in EXPECTED}
    for number, job in enumerate(jobs):
        path = f"/v1/jobs/{job.id}"
        found["bare"].append(_get(path, filled, number))
        found["poll"].append(_get(path, filled, number, {"If-None-Match": job.etag}))
        found["poll, changed"].append(_get(path, filled, number, {"If-None-Match": f'"{job.id}-1"'}))
        behind = cursors.make("jobs", [job.created_at.isoformat(), job.id])
        found["list"].append(_get(f"/v1/jobs?limit=50&cursor={behind}", filled, number))
        row = filled.score_keys[choose.randrange(ROWS_PER_SET - 200)]
        behind = cursors.make(f"scores of {job.id} None", list(row))
        found["scores"].append(_get(f"{path}/scores?limit=200&cursor={behind}", filled, number))
        bits = choose.uniform(2.6, 7.4)
        plans = f"/v1/jobs/{planned[number % len(planned)].id}/plans"
        found["re-solve"].append(_post(plans, filled, number, {"budgets": [f"{bits:.6f} bpw"]}))
        found["submit"].append(_post("/v1/jobs", filled, number, filled.request))
    return found


def _get(path: str, filled: Filled, number: int, headers: Mapping[str, str] | None = None) -> str:
    return _text("GET", path, {"Authorization": _bearer(filled, number), **(headers or {})})


def _post(path: str, filled: Filled, number: int, body: Mapping[str, Any]) -> str:
    content = json.dumps(body)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    return _text("POST", path, {"Authorization": _bearer(filled, number), **headers}) + content


def _bearer(filled: Filled, number: int) -> str:
    return f"Bearer {filled.tokens[number % len(filled.tokens)]}"


def _text(method: str, path: str, headers: Mapping[str, str]) -> str:
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{''.join(lines)}\r\n"


@contextmanager
def _server(settings: Settings, *module: str) -> Iterator[Server]:
    """A server process on a free port and, where there are two, a core of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = settings.model_copy(update={"port": port}).as_environment()
    with (settings.data_dir / f"{module[0]}.log").open("w") as log:
        process = _started(
            SERVER_CORE,
            "-m",
            *module,
            stdin=subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, **own, "PYTHONPATH": str(ROOT)},
        )
    try:
        _await_answer(process, port)
        yield Server(port, process.pid)
    finally:
        process.terminate()
        process.wait(60)


def _await_answer(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"The server must answer on port {port}. Got nothing, exit code {process.poll()}.")


def _started(core: int, *words: str, **options: Any) -> subprocess.Popen[bytes]:
    """A Python process on one core of its own, where the machine has two."""
    process = subprocess.Popen([sys.executable, *words], **options)  # noqa: S603 - a command of ours
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(usable) > 1:
        os.sched_setaffinity(process.pid, {usable[core]})
    return process


@contextmanager
def _own_database(server: str) -> Iterator[str]:
    url, name = make_url(server).set(drivername="postgresql+psycopg"), f"bitplan_load_{uuid.uuid4().hex}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
        engine.dispose()


if __name__ == "__main__":
    main()
