"""``bitplan serve``: the API and a runner as two supervised child processes.

Each child's standard input is a pipe that only the supervisor holds: when the supervisor dies, however it
dies, the pipe closes and the child stops by itself.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import structlog

from service import logs
from service.access import is_local_host
from service.db import migrate
from service.db.engine import Database
from service.db.repositories import keys
from service.executors.catalog import require_usable
from service.settings import Settings

SETTLED_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 30.0
POLL_SECONDS = 0.2
ROLES = ("api", "runner")

log = structlog.get_logger()


class BindRefused(ValueError):  # noqa: N818 - an error is named after what went wrong
    """Other machines could connect, and there is no key that they could show."""


def require_safe_bind(settings: Settings) -> None:
    """Raise `BindRefused` where other machines could connect without a key, unless access is "open"."""
    if is_local_host(settings.host) or settings.access == "open":
        return
    migrate.upgrade(settings.database_url)
    database = Database(settings.database_url)
    try:
        with database.read() as session:
            usable = keys.usable(session)
    finally:
        database.close()
    if not usable:
        raise BindRefused(
            "host must be a loopback address (127.0.0.1, ::1 or localhost) while there is no usable key. "
            f"Got {settings.host!r}. Make a key with `bitplan keys create --tenant NAME --scope submit`, use "
            "an SSH tunnel, or pass --insecure to let everybody who can connect do everything."
        )


def serve(settings: Settings) -> int:
    """Migrate the database, then run API and runner until SIGINT or SIGTERM; the exit code to leave with.

    A runner that dies is started again. An API that dies is too, unless it dies at once (its port is taken,
    for example). Raises `BindRefused`, `DatabaseTooNew`, and ValueError for an
    executor that cannot be used.
    """
    logs.configure(settings.log_level)
    require_safe_bind(settings)
    require_usable(settings)
    migrate.upgrade(settings.database_url)
    supervisor = Supervisor(settings)
    _stop_on_signals(supervisor)
    return supervisor.run()


@dataclass
class _Child:
    role: str
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    pause: float = 0.5
    due: float = field(default_factory=time.monotonic)


class Supervisor:
    """Keeps one child per role alive until `stop`."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._children = [_Child(role) for role in ROLES]
        self._stop = threading.Event()

    def stop(self) -> None:
        """Ask `run` to end. Callable from signal handlers."""
        self._stop.set()

    def run(self) -> int:
        """Supervise; 0 after `stop`, 1 when the API cannot be started."""
        try:
            while not self._stop.wait(POLL_SECONDS):
                for child in self._children:
                    if not self._tend(child):
                        return 1
            return 0
        finally:
            self._end()

    def pids(self) -> dict[str, int]:
        """The process ids by role."""
        return {child.role: child.process.pid for child in self._children if child.process is not None}

    def _tend(self, child: _Child) -> bool:
        """Start the child when it is due; False when there is no point in starting it again."""
        now = time.monotonic()
        if child.process is None and now >= child.due:
            child.process, child.began = start_child(child.role, self._settings), now
        if child.process is None or (code := child.process.poll()) is None:
            return True
        log.warning("serve.child_died", role=child.role, exit_code=code)
        child.process = None
        if now - child.began > SETTLED_SECONDS:
            child.pause = 0.5
        elif child.role == "api":
            return False
        child.due, child.pause = now + child.pause, min(child.pause * 2, LONGEST_PAUSE_SECONDS)
        return True

    def _end(self) -> None:
        """Ask every child to stop, and kill what is still there after the grace."""
        processes = [child.process for child in self._children if child.process is not None]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + self._settings.grace_seconds + 10
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_child(role: str, settings: Settings) -> "subprocess.Popen[bytes]":
    """Start the API or a runner with these settings, in a session of its own, so that Ctrl-C reaches only
    us.
    """
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "service.serve", role],
        stdin=subprocess.PIPE,
        env={**os.environ, **settings.as_environment()},
        start_new_session=True,
    )


def run_child(role: str) -> None:
    """The body of a child process."""
    threading.Thread(target=_stop_with_supervisor, daemon=True).start()
    settings = Settings()
    if role == "api":
        _run_api(settings)
    else:
        from service.runner import process

        process.run(settings)


def _run_api(settings: Settings) -> None:
    import uvicorn

    logs.configure(settings.log_level)
    logs.adopt_libraries(settings.log_level)
    from service.app import app

    gc.collect()
    gc.freeze()  # what was imported stays: walking it again and again would stop all requests for 0.1 s
    uvicorn.run(app, **server_options(settings))


def server_options(settings: Settings) -> dict[str, Any]:
    """How uvicorn is to serve, for `uvicorn.run`."""
    return {
        "host": settings.host,
        "port": settings.port,
        "log_config": None,
        "log_level": settings.log_level,
        "timeout_graceful_shutdown": int(settings.grace_seconds),
        "server_header": False,
        "access_log": False,
    }


def _stop_with_supervisor() -> None:
    """Wait for the end of the pipe, below Python's buffers, whose lock the interpreter wants at its end."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _stop_on_signals(supervisor: Supervisor) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        supervisor.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


if __name__ == "__main__":
    run_child(sys.argv[1])
