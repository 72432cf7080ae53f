"""The services of docker-compose.yml as processes of one machine: their very commands, environments and health checks,
with other places and ports.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from service.client import Client
from tests.deployment.rules import ROOT, SECRETS, load
from tests.processes import QUICK, Service, free_port
from tests.ray_nodes import STORE_BYTES, own_address

TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
MODULES = {"bitplan": "service.cli.main", "uvicorn": "uvicorn", "ray": "ray.scripts.scripts"}
HEAD = "ray-head:6379"
MARK = "BITPLAN_TEST_ROLE"
HEALTHY_SECONDS = 240
CHECK_SECONDS = 60


class Topology(Service):
    """Processes of the compose file, one per role: "api-2" is a second one of the service "api".

    Where a container would be started again, `supervise` does.
    """

    key = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._services: dict[str, Any] = load(TEXT)["services"]
        self.ports = {role: free_port() for role in self.roles if self.name_of(role) == "api"}
        self.head = f"{own_address()}:{free_port()}"
        self._short = Path(tempfile.mkdtemp(prefix="bt-"))  # paths of Ray's sockets must be short
        url = make_url(self.database_url)
        self._address = url._replace(password=None).render_as_string()
        self._secrets = {"postgres_password": url.password or "", "ray_token": os.urandom(32).hex()}
        (self.folder / "secrets").mkdir(mode=0o700)
        for name, value in self._secrets.items():
            (self.folder / "secrets" / name).write_text(f"{value}\n")

    @property
    def started(self) -> list[str]:
        """The roles that were started at all."""
        return list(self._processes)

    @staticmethod
    def name_of(role: str) -> str:
        """The service of a role."""
        return re.sub(r"-\d+$", "", role)

    def start(self) -> Topology:
        self.once("migrate", self._services["migrate"]["command"])
        for role in self.roles:
            self.start_role(role)
            if role == "ray-head":
                self.wait_until_healthy(role)
        file = self.folder / "key"
        self.once("api", ["bitplan", "keys", "create", "--scope", "submit", "-o", str(file)])
        self.key = file.read_text().strip()
        for role in self.roles:
            self.wait_until_healthy(role)
        return self

    def start_role(self, role: str) -> None:
        command = self._here(self._services[self.name_of(role)]["command"], role)
        if self.name_of(role).startswith("ray"):
            command += self._smaller(role)
        self._processes[role] = self.launch(
            command, self.environment_of(role), self.folder / f"{role}.log", self.folder
        )

    def environment_of(self, role: str) -> Mapping[str, str]:
        """What the container would have, and nothing of this machine's but where programs are."""
        given: dict[str, str] = self._services[self.name_of(role)].get("environment", {})
        home = self.folder / f"home-{role}"
        home.mkdir(exist_ok=True)
        places = {
            "/data": str(self.folder / "data"),
            "/cache": str(self.folder / f"cache-{role}"),
            "/tmp": str(home),
        }
        own = {
            name: places.get(value, value)
            .replace(SECRETS, f"{self.folder}/secrets/")
            .replace(HEAD, self.head)
            for name, value in given.items()
        }
        if "BITPLAN_DATABASE_URL" in own:
            own["BITPLAN_DATABASE_URL"] = self._address
        if not self._secrets["postgres_password"]:
            own.pop("BITPLAN_DATABASE_PASSWORD_FILE", None)
        return {
            **QUICK,
            **own,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "BITPLAN_WORKERS": "1",
            MARK: f"{self.folder}/{role}",
            **self.variables,
        }

    def once(self, role: str, words: Sequence[str]) -> str:
        """What a command prints that runs to its end as `docker compose run` would run it."""
        done = subprocess.run(
            [sys.executable, "-m", *self._here(words, role)],
            env=self.environment_of(role),
            capture_output=True,
            text=True,
            cwd=self.folder,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def healthy(self, role: str) -> bool:
        """What the health check of the container would say now."""
        kind, program, *arguments = self._services[self.name_of(role)]["healthcheck"]["test"]
        assert kind == "CMD"
        words = self._here([program, *arguments], role)
        command = [sys.executable, *words[1:]] if program == "python" else [sys.executable, "-m", *words]
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command,
                env=self.environment_of(role),
                capture_output=True,
                check=False,
                timeout=CHECK_SECONDS,
            )
            return done.returncode == 0
        return False

    def wait_until_healthy(self, role: str) -> None:
        deadline = time.monotonic() + HEALTHY_SECONDS
        while not self.healthy(role):
            assert time.monotonic() < deadline, self.log(role)
            time.sleep(0.2)

    def url_of(self, role: str) -> str:
        return f"http://127.0.0.1:{self.ports[role]}"

    def client_of(self, role: str) -> Client:
        return Client(self.url_of(role), timeout=30.0, retries=20, key=self.key)

    def kill(self, role: str) -> bool:
        """SIGKILL to the process and all below it, as when a container is killed; workers end by themselves."""
        pid = self.pid(role)
        if pid is None:
            return False
        doomed = self._marked(role) if self.name_of(role).startswith("ray") else [pid]
        for each in doomed:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        return True

    def stop(self) -> None:
        super().stop()
        for role in self.started:
            for each in self._marked(role):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        shutil.rmtree(self._short, ignore_errors=True)

    def _marked(self, role: str) -> list[int]:
        """Every process of a role, whoever started it; workers have another environment, and leave by themselves."""
        mark = f"{MARK}={self.folder}/{role}\0".encode()
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes() + b"\0":
                    found.append(pid)
        return found

    def _smaller(self, role: str) -> list[str]:
        """What makes a node of one machine: one CPU of it, little memory, and files of its own."""
        place = self._short / role
        place.mkdir(exist_ok=True)
        cpus = ["--num-cpus=1"] if self.name_of(role) == "ray-worker" else []
        return [
            f"--temp-dir={place}",
            f"--object-store-memory={STORE_BYTES}",
            "--include-log-monitor=false",
            *cpus,
        ]

    def _here(self, words: Sequence[str], role: str) -> list[str]:
        """The words of a container's command for this machine; the first is a module, or python."""
        program, *rest = [str(word) for word in words]
        if program == "on-ray-node":  # the head is a node of this machine already
            _, program, *rest = rest
        port = str(self.ports.get(role, 8000))
        swapped = {"0.0.0.0": "127.0.0.1", "8000": port}
        head = self.head.rpartition(":")[2]
        return [
            MODULES.get(program, program),
            *(
                swapped.get(word, word)
                .replace("127.0.0.1:8000/", f"127.0.0.1:{port}/")
                .replace(HEAD, self.head)
                .replace("--port=6379", f"--port={head}")
                for word in rest
            ),
        ]
