"""A Ray cluster of several nodes on this machine, each `ray start` with files and a cache of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[1]
STORE_BYTES = 100_000_000
START_SECONDS = 180
RETRIES = 3


class RayNodes:
    """A head that takes no work, and nodes that `add` starts. Ends every process of theirs, and nothing else.

    `paths` are folders that nodes import from, beside the repository.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] = (), variables: Mapping[str, str] | None = None):
        self.folder = folder
        self._paths = os.pathsep.join(str(path) for path in (ROOT, *paths))
        self._variables = dict(variables or {})
        self._short = Path(tempfile.mkdtemp(prefix="br-"))  # paths of sockets must be short
        self.token_file = self._short / "token"
        self.token_file.write_text(secrets.token_hex(32))
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""

    def __enter__(self) -> Self:
        for _ in range(RETRIES):
            port = free_port()
            self.address = f"{own_address()}:{port}"
            self._start("head", f"--head --port={port} --num-cpus=0 --include-dashboard=false".split())
            if self._answers("head"):
                return self
            self.kill("head")
        raise AssertionError(f"the head must start: {self._log('head').read_text()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._nodes):
            self.kill(name)
        shutil.rmtree(self._short, ignore_errors=True)

    @property
    def settings(self) -> dict[str, str]:
        """Of a runner that uses this cluster."""
        return {"ray_address": self.address, "ray_token_file": str(self.token_file)}

    def add(self, name: str, cpus: int = 2, **variables: str) -> None:
        """Start a node and wait until it has joined."""
        self._start(name, [f"--address={self.address}", f"--num-cpus={cpus}"], variables)
        assert self._answers(name), self._log(name).read_text()

    def kill(self, name: str) -> None:
        """End a node at once, with everything that runs on it, as a power cut would."""
        process = self._nodes.pop(name)
        for number in (signal.SIGKILL, signal.SIGKILL):
            for pid in self._processes(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        process.kill()
        process.wait()

    def pause(self, name: str, number: signal.Signals) -> None:
        """Send SIGSTOP or SIGCONT to all of a node."""
        for pid in self._processes(name):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def cache(self, name: str) -> Path:
        """Where a node keeps models."""
        return self._short / f"cache-{name}"

    def environment(self) -> dict[str, str]:
        """Of a process that uses the cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def _start(self, name: str, options: list[str], variables: Mapping[str, str] | None = None) -> None:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("BITPLAN_", "RAY_"))},
            **self.environment(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": self._paths,
            "BITPLAN_RAY_CACHE": str(self.cache(name)),
            "BITPLAN_TEST_NODE": name,
            **self._variables,
            **(variables or {}),
        }
        place = self._short / name
        place.mkdir(exist_ok=True)
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--block",
            f"--object-store-memory={STORE_BYTES}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
            f"--temp-dir={place}",
            *options,
        ]
        with self._log(name).open("ab") as log:
            self._nodes[name] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _answers(self, name: str) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._nodes[name].poll() is None:
            if "Ray runtime started" in self._log(name).read_text():
                return True
            time.sleep(0.1)
        return False

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _processes(self, name: str) -> list[int]:
        """Those that have this node's marks in their environment, or descend from its first process."""
        mark = f"BITPLAN_RAY_CACHE={self.cache(name)}\0".encode()
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _has(pid, mark)]


def _has(pid: int, mark: bytes) -> bool:
    try:
        return pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    except OSError:
        return False


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def own_address() -> str:
    """The address by which Ray calls this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
