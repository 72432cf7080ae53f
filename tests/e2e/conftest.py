"""The API and a runner as real processes, and tiny real models to send them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from service.client import Client
from service.db.engine import Database

ROOT = Path(__file__).parents[2]
POSTGRES = os.environ.get("BITPLAN_TEST_POSTGRES_URL")
START_SECONDS = 60
QUICK = {
    "BITPLAN_WORKERS": "1",
    "BITPLAN_POLL_SECONDS": "0.05",
    "BITPLAN_HEARTBEAT_SECONDS": "1",
    "BITPLAN_LEASE_SECONDS": "5",
    "BITPLAN_LOG_LEVEL": "debug",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Service:
    """One API process and one runner process that share a database and a data folder.

    `supervise` starts again whichever of them dies, as `bitplan serve` or systemd would; `deaths` counts.
    """

    folder: Path
    database_url: str
    variables: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    deaths: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ending = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        own = {"BITPLAN_DATABASE_URL": self.database_url, "BITPLAN_DATA_DIR": str(self.folder / "data")}
        return {**os.environ, **QUICK, **own, "PYTHONPATH": str(ROOT), **self.variables}

    def start(self) -> Service:
        for role in ("api", "runner"):
            self._start(role)
        self.wait_until_ready()
        deadline = time.monotonic() + START_SECONDS
        while not self.logged("runner.started"):
            assert self.alive("runner"), self.log("runner")
            assert time.monotonic() < deadline, self.log("runner")
            time.sleep(0.05)
        return self

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with Client(self.url) as client:
            while not client.is_ready():
                assert time.monotonic() < deadline, self.log("api")
                time.sleep(0.05)

    def supervise(self) -> Service:
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        return self

    def client(self) -> Client:
        return Client(self.url, timeout=30.0, retries=8)

    def pid(self, role: str) -> int | None:
        """The process id of api or runner, or of a worker of the runner; None when there is none now."""
        if role != "worker":
            process = self._processes[role]
            return process.pid if process.poll() is None else None
        runner = self.pid("runner")
        return None if runner is None else next(iter(children(runner)), None)

    def kill(self, role: str) -> bool:
        """SIGKILL to a process; False when there is none."""
        pid = self.pid(role)
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def alive(self, role: str) -> bool:
        return self.pid(role) is not None

    def stop(self) -> None:
        self._ending.set()
        if self._keeper is not None:
            self._keeper.join()
        for process in self._processes.values():
            process.kill()
            process.wait()

    def log(self, role: str) -> str:
        """What the processes of this role wrote, all of them one after the other."""
        return (self.folder / f"{role}.log").read_text(encoding="utf-8", errors="replace")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The structured lines of the runner with this event."""
        lines = [json.loads(line) for line in self.log("runner").splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def database(self) -> closing[Database]:
        return closing(Database(self.database_url))

    def _start(self, role: str) -> None:
        api = ["uvicorn", "service.app:app", "--port", str(self.port), "--log-level", "warning"]
        command = api if role == "api" else ["service.cli.main", "runner"]
        with (self.folder / f"{role}.log").open("ab") as output:
            self._processes[role] = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
            )

    def _keep(self) -> None:
        while not self._ending.wait(0.02):
            for role, process in list(self._processes.items()):
                if process.poll() is not None:
                    self.deaths[role] += 1
                    self._start(role)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children(pid: int) -> list[int]:
    """The processes that any thread of `pid` started."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in listing.read_text().split()]
        except OSError:
            continue
    return found


Start = Callable[..., Service]


@pytest.fixture(scope="session")
def new_service(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Service]:
    """Make a service that is not started: new_service(variables, database_url)."""

    def make(variables: Mapping[str, str] | None = None, database_url: str = "") -> Service:
        folder = tmp_path_factory.mktemp("service")
        return Service(folder, database_url or f"sqlite:///{folder / 'bitplan.db'}", variables or {})

    return make


@pytest.fixture
def start(new_service: Callable[..., Service], request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start services that end with the test; their logs are shown when it fails."""
    services: list[Service] = []

    def begin(variables: Mapping[str, str] | None = None, database_url: str = "") -> Service:
        services.append(new_service(variables, database_url))
        return services[-1].start()

    yield begin
    for service in services:
        service.stop()
        show(service)


@pytest.fixture(scope="module")
def variables() -> Mapping[str, str]:
    """Environment variables of the module's service; a module may say otherwise."""
    return {}


@pytest.fixture(scope="module")
def service(new_service: Callable[..., Service], variables: Mapping[str, str]) -> Iterator[Service]:
    """One service for all tests of a module."""
    service = new_service(variables)
    try:
        yield service.start()
    finally:
        service.stop()
        show(service)


def show(service: Service) -> None:
    """pytest shows this only when the test failed."""
    for role in ("api", "runner"):
        lines = service.log(role).splitlines()
        print(f"--- {role}: the last of {len(lines)} lines", *lines[-60:], sep="\n")


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """An empty PostgreSQL database of this test alone, migrated by `bitplan migrate`."""
    if not POSTGRES:
        pytest.skip("BITPLAN_TEST_POSTGRES_URL is not set")
    name = f"bitplan_test_{uuid.uuid4().hex}"
    administer(f'CREATE DATABASE "{name}"')
    url = make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    migrate = [sys.executable, "-m", "service.cli.main", "migrate", "--database-url", url]
    subprocess.run(migrate, check=True, capture_output=True, cwd=ROOT)
    yield url
    administer(f'DROP DATABASE "{name}" WITH (FORCE)')


def administer(statement: str) -> None:
    engine = create_engine(POSTGRES or "", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@dataclass(frozen=True)
class Input:
    """A model folder with calibration data."""

    folder: Path
    calibration: Path


@pytest.fixture(scope="session")
def resnet(tiny: Callable[[str], Any]) -> Input:
    """An image classifier with labeled calibration images as safetensors."""
    made = tiny("resnet")
    return Input(made.folder, made.data)


@pytest.fixture(scope="session")
def llama(tiny: Callable[[str], Any]) -> Input:
    """A causal language model with calibration text as jsonl."""
    made = tiny("llama")
    rows = made.folder / "rows.jsonl"
    texts = made.data.read_text(encoding="utf-8").splitlines()
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts), encoding="utf-8")
    return Input(made.folder, rows)
