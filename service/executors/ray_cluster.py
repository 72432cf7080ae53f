"""Workers on the nodes of a Ray cluster. The runner itself never loads Ray: a driver process of its own does
(ray_driver.py), and may die.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import structlog

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit
from service.executors.local_pool import LocalPool
from service.executors.messages import MAXIMUM_BYTES, pack, pack_unit, unpack, unpack_result
from service.executors.protocol import Executor, ExecutorAway, ExecutorSettings, Failure, Outcome
from service.executors.ray_settings import RaySettings
from service.executors.worker_process import environment, tail_of

DRIVER = "service.executors.ray_driver"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 15.0
CLOSING_SECONDS = 20.0
PROBE_SECONDS = 120.0

log = structlog.get_logger()

Heard = tuple[dict[str, Any], tuple[bytes, ...]]


def ray_executor(settings: ExecutorSettings) -> Executor:
    """The executor of these settings.

    What a worker writes into a folder of the runner (a checkpoint) must get there: unless the nodes share
    the runner's store, a worker of its own machine does that.
    """
    if settings.isolation.writable and not settings.ray.shared_store:
        return LocalPool(settings)
    return RayCluster(settings)


class RayCluster:
    """Units on actors of a Ray cluster, `capacity` at a time.

    When the driver or the cluster dies, units that were running come back as `worker_crash`, and those that
    waited go to the next driver. While there is no cluster they wait; `wait` raises `ExecutorAway` when
    that has lasted for the settings' patience.
    """

    name = "ray"

    def __init__(self, settings: ExecutorSettings):
        self.capacity = settings.workers
        self._settings = settings
        self._spec: SessionSpec | None = None
        self._units: dict[str, Unit] = {}
        self._began: set[str] = set()
        self._outcomes: deque[Outcome] = deque()
        self._driver: _Driver | None = None
        self._connected = False
        self._why = ""
        self._away_since: float | None = None
        self._due, self._pause = 0.0, FIRST_PAUSE_SECONDS

    def start(self, spec: SessionSpec) -> None:
        """See `Executor`; the cluster is asked for workers with the first unit."""
        self._spec = spec

    def submit(self, key: str, unit: Unit) -> None:
        """See `Executor`."""
        if self._spec is None:
            raise RuntimeError("An executor must be started before it is used. Call start(spec).")
        self._units[key] = unit
        if self._driver is not None:
            self._driver.submit(key, unit)
        else:
            self._connect_if_due()

    def wait(self, timeout: float) -> list[Outcome]:
        """See `Executor`."""
        deadline = time.monotonic() + timeout
        while True:
            self._connect_if_due()
            self._listen(0.0 if self._outcomes else max(0.0, deadline - time.monotonic()))
            if self._outcomes or time.monotonic() >= deadline:
                break
        if not self._outcomes:
            self._require_patience()
        given = list(self._outcomes)
        self._outcomes.clear()
        return given

    def close(self, grace_seconds: float = 10.0) -> None:
        """See `Executor`."""
        driver = self._driver
        self._spec, self._away_since = None, None
        if driver is not None and self._connected:
            driver.close(grace_seconds)
            deadline = time.monotonic() + grace_seconds + CLOSING_SECONDS
            while self._driver is not None and time.monotonic() < deadline:
                self._listen(0.2)
        self._units.clear()
        if driver is not None:
            driver.end()
        self._driver = None

    @property
    def driver_pid(self) -> int | None:
        """The process that uses Ray, if it lives."""
        return None if self._driver is None else self._driver.pid

    def _connect_if_due(self) -> None:
        if self._driver is not None or self._spec is None or not self._units or time.monotonic() < self._due:
            return
        self._driver, self._connected = _Driver(self._settings, self._spec), False
        for key, unit in self._units.items():
            self._driver.submit(key, unit)

    def _listen(self, timeout: float) -> None:
        """Take in what the driver says, waiting for the first of it."""
        driver = self._driver
        if driver is None:
            time.sleep(min(timeout, max(0.0, self._due - time.monotonic())) or min(timeout, 0.05))
            return
        heard = driver.hear(timeout)
        while heard is not None:
            self._take(driver, *heard)
            heard = driver.hear(0)

    def _take(self, driver: _Driver, message: Mapping[str, Any], attached: tuple[bytes, ...]) -> None:
        said = message["said"]
        if said == "connected":
            self._connected = True
            self._why, self._away_since, self._pause = "", None, FIRST_PAUSE_SECONDS
        elif said == "away":
            self._why = message["why"]
            log.warning("ray.away", why=self._why)
            self._away_since = self._away_since or time.monotonic()
        elif said == "began":
            self._began.add(message["key"])
            self._away_since = None
        elif said == "gaps":
            self._settings.on_gaps(tuple(message["gaps"]))
        elif said == "log":
            log.info(message["event"], **message["facts"])
        elif said in ("result", "failure"):
            self._outcome(message, attached)
        elif said == "ended":
            self._lost(driver)

    def _outcome(self, message: Mapping[str, Any], attached: tuple[bytes, ...]) -> None:
        key = message["key"]
        self._units.pop(key, None)
        self._began.discard(key)
        if message["said"] == "result":
            self._outcomes.append(Outcome(key, result=unpack_result(*attached)))
        else:
            self._outcomes.append(Outcome(key, failure=Failure(**message["failure"])))

    def _lost(self, driver: _Driver) -> None:
        """The driver has ended: what was running is lost, the rest goes to the next one after a pause."""
        driver.end()
        self._driver = None
        if self._spec is None:  # closed
            return
        said = f"The driver of the Ray cluster must live. Got its end ({driver.code}): {driver.last_words}"
        self._why = self._why or said
        for key in sorted(self._began & self._units.keys()):
            del self._units[key]
            self._outcomes.append(Outcome(key, failure=Failure("worker_crash", said, {"log": driver.log})))
        self._began.clear()
        self._away_since = self._away_since or time.monotonic()
        self._due = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE_SECONDS)
        log.warning("ray.driver_ended", code=driver.code, log=driver.log)

    def _require_patience(self) -> None:
        """Raise `ExecutorAway` where nothing could run for too long. While a unit runs, one can: other slots
        may wait for nodes that are not as they must be.
        """
        since = None if self._began else self._away_since
        if since is not None and time.monotonic() - since >= self._settings.ray.patience_seconds:
            raise ExecutorAway(self._why)


class _Driver:
    """The runner's end of one driver process. Sends and receives in threads of its own, so that no call
    waits for the other end.
    """

    def __init__(self, settings: ExecutorSettings, spec: SessionSpec):
        settings.log_folder.mkdir(parents=True, exist_ok=True)
        self._log: Path = settings.log_folder / f"worker-{os.getpid()}-ray.log"
        ours, theirs = socket.socketpair()
        with ours, theirs, self._log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", DRIVER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=driver_environment(settings.ray, os.environ),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            self._connection: Connection = Connection(ours.detach())
        self._heard: SimpleQueue[Heard] = SimpleQueue()
        self._to_say: SimpleQueue[tuple[bytes, ...] | None] = SimpleQueue()
        hello = {
            "spec": spec.as_json(),
            "factory": settings.session_factory,
            "workers": settings.workers,
            "isolation": settings.isolation.as_json(),
            "ray": settings.ray.as_json(),
        }
        self._to_say.put((pack(hello),))
        self._threads = [
            threading.Thread(target=target, name=f"ray-{target.__name__}", daemon=True)
            for target in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def log(self) -> str:
        """The name of its log."""
        return self._log.name

    @property
    def code(self) -> str:
        """How it ended."""
        code = self._process.returncode
        return "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"

    @property
    def last_words(self) -> str:
        """The last line of its log."""
        return next(reversed(tail_of(self._log).strip().splitlines()), "nothing in its log")

    def submit(self, key: str, unit: Unit) -> None:
        """Pass a unit on."""
        self._to_say.put((pack({"key": key}), *pack_unit(unit)))

    def close(self, grace_seconds: float) -> None:
        """Ask it to end within the grace; what it says until then is still heard."""
        self._to_say.put((pack({"close": grace_seconds}),))

    def hear(self, timeout: float) -> Heard | None:
        """The next message, None when there is none within `timeout` seconds. The last one is "ended"."""
        try:
            return self._heard.get(timeout=timeout) if timeout > 0 else self._heard.get_nowait()
        except Empty:
            return None

    def end(self) -> None:
        """Make sure that it is gone."""
        self._to_say.put(None)
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(5)
        self._connection.close()
        if self._log.exists() and self._log.stat().st_size == 0:
            self._log.unlink()

    def _send(self) -> None:
        while (message := self._to_say.get()) is not None:
            try:
                for part in message:
                    self._connection.send_bytes(part)
            except OSError:
                return

    def _receive(self) -> None:
        try:
            while True:
                message = unpack(self._connection.recv_bytes(MAXIMUM_BYTES))
                parts = 2 if message["said"] == "result" else 0
                attached = tuple(self._connection.recv_bytes(MAXIMUM_BYTES) for _ in range(parts))
                self._heard.put((message, attached))
        except (OSError, EOFError, ValueError):
            self._heard.put(({"said": "ended"}, ()))


def driver_environment(settings: RaySettings, given: Mapping[str, str]) -> dict[str, str]:
    """What the driver may know: Ray's own variables with the token, no database, no keys."""
    theirs = {name: value for name, value in given.items() if name.startswith("RAY_")}
    token = {"RAY_AUTH_TOKEN_PATH": settings.token_file} if settings.token_file else {}
    if token:
        theirs.pop("RAY_AUTH_TOKEN", None)
    defaults = {
        "RAY_gcs_server_request_timeout_seconds": "20",
        "RAY_NUM_REDIS_GET_RETRIES": "8",  # seconds until a cluster that refuses us is told
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {**environment(1, given), **defaults, **theirs, **token, "RAY_AUTH_MODE": settings.auth}


def probe(settings: RaySettings) -> dict[str, Any]:
    """What `ray_driver.probe` finds, or {"away": why}.

    Raises OSError, ValueError or subprocess.SubprocessError where nothing is found out.
    """
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-P", "-m", DRIVER],
        input=json.dumps(settings.as_json()),
        env=driver_environment(settings, os.environ),
        capture_output=True,
        check=True,
        text=True,
        timeout=PROBE_SECONDS,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
