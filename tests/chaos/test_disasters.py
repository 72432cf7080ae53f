"""What machines do to a service in the middle of its work: no database, no room, no writing, another time.

Clients work all the time. Each test ends with the checker: nothing that was seen is lost, every job ends.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.harness import Run, fork_server
from tests.fork_server import ForkServer
from tests.processes import free_port

DISK_BYTES = 48 * 2**20
CLOCK = "libfaketime.so.1"
BUSY_SECONDS = 33
pytestmark = pytest.mark.timeout(900)


def go_on(run: Run, seconds: float) -> None:
    """Let clients work for so long, and until something new has succeeded, unless one has failed."""
    time.sleep(seconds)
    since = time.monotonic()
    before = succeeded(run)
    while succeeded(run) == before and not run.over.is_set() and time.monotonic() < since + 300:
        time.sleep(0.1)


def succeeded(run: Run) -> int:
    """Searches that clients have seen succeed."""
    return len({one.path for one in list(run.history.seen) if succeeds(one.got)})


def succeeds(got: object) -> bool:
    return isinstance(got, dict) and (got.get("kind"), got.get("state")) == ("search", "succeeded")


@dataclass
class Cluster:
    """A PostgreSQL server of this test alone, run by the user postgres."""

    folder: Path
    programs: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def make(self) -> None:
        self._run(
            "initdb",
            "-D",
            str(self.folder / "data"),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
        )
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        log = str(self.folder / "log")
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", log, "-w", "-t", "120", "start"
        )

    def stop(self, mode: str) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "-t", "120", "stop")

    def _run(self, name: str, *arguments: str) -> None:
        """initdb refuses root."""
        user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(
            [self.programs / name, *arguments],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
            **user,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL server is installed under /usr/lib/postgresql")
    folder = Path(tempfile.mkdtemp(prefix="bitplan-cluster-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    made = Cluster(folder, found[-1].parent, free_port())
    try:
        made.make()
        yield made
    finally:
        with_server = (folder / "data" / "postmaster.pid").exists()
        if with_server:
            made.stop("immediate")
        shutil.rmtree(folder)


@pytest.mark.postgres
def test_postgresql_restarts_under_load(endure, cluster):
    """Immediate: as after a power cut. Fast: as an administrator does it."""
    chance = random.Random(1)

    def trouble(run: Run) -> None:
        for mode in ("immediate", "fast", "immediate"):
            go_on(run, 1.0)
            cluster.stop(mode)
            time.sleep(chance.uniform(0.5, 3.0))
            cluster.start()
        go_on(run, 1.0)

    told = endure(trouble, url=cluster.url)
    assert 503 in told.answers()
    assert told.told["states"].keys() <= {"succeeded", "cancelled"}


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A disk of DISK_BYTES; only root may make one."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("a disk that can be filled is a tmpfs, and mounting one is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return ballast


def filled(disk: Path) -> Callable[[Run], None]:
    """Twice full for some seconds, with clients that go on in between."""

    def trouble(run: Run) -> None:
        for _ in range(2):
            go_on(run, 0.5)
            ballast = fill(disk)
            time.sleep(5)
            ballast.unlink()
        go_on(run, 0.5)

    return trouble


NIGHTLY = [pytest.param(what, marks=pytest.mark.nightly) for what in ("store", "database")]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["both", *NIGHTLY])
def test_a_full_disk_is_told_and_waited_out(endure, tmp_path, what):
    folder = tmp_path / "service"
    disk = folder / ("database" if what == "database" else "data")
    with mounted(disk):
        database = folder / "bitplan.db" if what == "store" else disk / "bitplan.db"
        variables = {"BITPLAN_LEAST_FREE_BYTES": "0"}
        told = endure(filled(disk), folder=folder, url=f"sqlite:///{database}", variables=variables)
    assert told.answers() & {503, 507}
    assert told.told["states"].keys() <= {"succeeded", "cancelled"}


@pytest.mark.slow
def test_a_read_only_store_is_told_and_waited_out(endure, tmp_path):
    folder = tmp_path / "service"

    def trouble(run: Run) -> None:
        go_on(run, 0.5)
        remount(folder / "data", "ro")
        time.sleep(5)
        remount(folder / "data", "rw")
        go_on(run, 0.5)

    with mounted(folder / "data"):
        variables = {"BITPLAN_LEAST_FREE_BYTES": "0"}
        told = endure(trouble, folder=folder, variables=variables)
    assert 503 in told.answers()
    assert told.told["states"].keys() <= {"succeeded", "cancelled"}


def remount(folder: Path, mode: str) -> None:
    """Read-only only works while nobody has a file open to write, which is for milliseconds here."""
    deadline = time.monotonic() + 60
    command = ["mount", "-o", f"remount,{mode}", str(folder)]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, mode
        time.sleep(0.002)


@pytest.mark.slow
def test_a_database_that_is_busy_for_half_a_minute_is_waited_for(endure, tmp_path):
    """Somebody holds SQLite's one write lock for longer than a writer waits."""
    folder = tmp_path / "service"

    def trouble(run: Run) -> None:
        go_on(run, 0.5)
        with closing(sqlite3.connect(folder / "bitplan.db", isolation_level=None, timeout=60)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            time.sleep(BUSY_SECONDS)
            holder.execute("ROLLBACK")
        go_on(run, 0.5)

    told = endure(trouble, folder=folder)
    assert told.answers() <= {200, 201, 202, 204, 304, 409, 503}
    assert told.told["states"].keys() <= {"succeeded", "cancelled"}


@dataclass
class Clock:
    """The wall clock of every process that the server forks."""

    forks: ForkServer
    file: Path

    def jump(self, seconds: int) -> None:
        """Set it to so many seconds from the true time."""
        growing = self.file.with_suffix(".new")
        growing.write_text(f"{seconds:+d}\n")
        growing.replace(self.file)


@pytest.fixture
def clock(tmp_path: Path, recording: Path) -> Iterator[Clock]:
    found = sorted(Path("/usr/lib").glob(f"*/faketime/{CLOCK}"))
    if not found:
        pytest.skip("libfaketime is not installed (apt-get install faketime)")
    file = tmp_path / "clock"
    file.write_text("+0\n")
    variables = {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    forks = fork_server(recording, variables)
    yield Clock(forks, file)
    forks.close()


def jumping(clock: Clock) -> Callable[[Run], None]:
    def trouble(run: Run) -> None:
        for seconds in (3600, -3600, 0):
            go_on(run, 2.0)
            clock.jump(seconds)
        go_on(run, 2.0)

    return trouble


@pytest.mark.slow
def test_clocks_that_jump_an_hour_lose_nothing(endure, clock):
    """With SQLite the jumping clock is that of the leases too: a runner may be taken for lost, nothing more."""
    told = endure(jumping(clock), server=clock.forks)
    assert told.told["states"].keys() <= {"succeeded", "cancelled"}


@pytest.mark.postgres
@pytest.mark.nightly
def test_clocks_that_jump_are_nothing_to_leases_on_postgresql(endure, clock, postgres_url):
    """Leases are measured by the clock of the database."""
    told = endure(jumping(clock), server=clock.forks, url=postgres_url)
    assert told.told["states"].keys() <= {"succeeded", "cancelled"}
