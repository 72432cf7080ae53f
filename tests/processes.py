"""The API and runners as real processes, supervised, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from service.client import Client
from service.db.engine import Database
from tests.fork_server import children_of

ROOT = Path(__file__).parents[1]
START_SECONDS = 180
QUICK = {
    "BITPLAN_WORKERS": "1",
    "BITPLAN_POLL_SECONDS": "0.05",
    "BITPLAN_HEARTBEAT_SECONDS": "1",
    "BITPLAN_LEASE_SECONDS": "5",
    "BITPLAN_LOG_LEVEL": "debug",
    "OMP_NUM_THREADS": "1",
}


class Process(Protocol):
    """What `subprocess.Popen` and `fork_server.Forked` have in common."""

    pid: int

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


Launch = Callable[[Sequence[str], Mapping[str, str], Path, Path], Process]
"""Module and arguments, environment, log file, working folder."""


def start_interpreter(
    command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path
) -> Process:
    """A fresh interpreter that runs the module `command[0]`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
        )


@dataclass
class Service:
    """One API process and one runner process that share a database and a data folder.

    `supervise` starts again whichever of them dies, as `bitplan serve` or systemd would; `deaths` counts. With
    other `roles` there are more runners ("runner-2").
    """

    folder: Path
    database_url: str
    variables: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    roles: Sequence[str] = ("api", "runner")
    launch: Launch = start_interpreter

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        self._processes: dict[str, Process] = {}
        self._ending = threading.Event()
        self._keepers: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        own = {"BITPLAN_DATABASE_URL": self.database_url, "BITPLAN_DATA_DIR": str(self.folder / "data")}
        return {**os.environ, **QUICK, **own, "PYTHONPATH": str(ROOT), **self.variables}

    def start(self) -> Service:
        for role in self.roles:
            self.start_role(role)
        self.wait_until_ready()
        for role in self.roles:
            if role != "api":
                self._wait_until_started(role)
        return self

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with Client(self.url) as client:
            while not client.is_ready():
                assert time.monotonic() < deadline, self.log("api")
                time.sleep(0.05)

    def supervise(self) -> Service:
        self._keepers = [
            threading.Thread(target=self._keep, args=(role,), daemon=True) for role in self.roles
        ]
        for keeper in self._keepers:
            keeper.start()
        return self

    def client(self) -> Client:
        return Client(self.url, timeout=30.0, retries=8)

    def process(self, role: str) -> Process:
        return self._processes[role]

    def pid(self, role: str) -> int | None:
        """The process id of a role, or of a worker of the runner; None when there is none now."""
        if role != "worker":
            process = self._processes[role]
            return process.pid if process.poll() is None else None
        runner = self.pid("runner")
        return None if runner is None else next(iter(children_of(runner)), None)

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
        for keeper in self._keepers:
            keeper.join()
        for process in self._processes.values():
            process.kill()
            process.wait()

    def log(self, role: str) -> str:
        """What the processes of this role wrote, all of them one after the other."""
        return (self.folder / f"{role}.log").read_text(encoding="utf-8", errors="replace")

    def logged(self, event: str, role: str = "runner") -> list[dict[str, Any]]:
        """The structured lines of a runner with this event."""
        lines = [json.loads(line) for line in self.log(role).splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def database(self) -> closing[Database]:
        return closing(Database(self.database_url))

    def start_role(self, role: str) -> None:
        """Start the process of a role."""
        api = ["uvicorn", "service.app:app", "--port", str(self.port), "--log-level", "warning"]
        command = api if role == "api" else ["service.cli.main", "runner"]
        log = self.folder / f"{role}.log"
        self._processes[role] = self.launch(command, self.environment_of(role), log, self.folder)

    def environment_of(self, role: str) -> Mapping[str, str]:
        """What the next process of a role is started with."""
        return self.environment

    def rest(self, role: str) -> float:
        """Seconds between the death of a role's process and the next start."""
        return 0.0

    def died(self, role: str) -> None:
        """Called when a process has died, before its role rests."""

    def _wait_until_started(self, role: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.logged("runner.started", role):
            assert self.alive(role), self.log(role)
            assert time.monotonic() < deadline, self.log(role)
            time.sleep(0.05)

    def _keep(self, role: str) -> None:
        try:
            while not self._ending.wait(0.02):
                if self._processes[role].poll() is not None:
                    self.deaths[role] += 1
                    self.died(role)
                    if not self._ending.wait(self.rest(role)):
                        self.start_role(role)
        except BaseException as error:
            self.broken(error)
            raise

    def broken(self, error: BaseException) -> None:
        """Called when a role's process cannot be kept alive, which is a fault of the test."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
