"""The runner's end of one worker process: start it, ask it, learn how it died."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit, UnitResult
from service import failpoints
from service.executors.messages import MAXIMUM_BYTES, pack, pack_unit, unpack, unpack_result
from service.executors.protocol import Failure

KEPT_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "PYTHONHASHSEED",
    "CUDA_VISIBLE_DEVICES",
    failpoints.VARIABLE,
    failpoints.ONCE_VARIABLE,
)
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LOG_TAIL_BYTES = 2000


class WorkerDied(Exception):  # noqa: N818 - an event, told to the one caller that waits for it
    """The process is gone, or said something that is no answer."""


def environment(threads: int, given: Mapping[str, str]) -> dict[str, str]:
    """What a worker may know of `given`: no database, no keys, no network, `threads` threads, the same
    modules.
    """
    kept = {name: given[name] for name in KEPT_VARIABLES if name in given}
    count = str(threads)
    numeric = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
    modules = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return {**kept, **OFFLINE, **numeric, "PYTHONPATH": modules, "PYTHONUNBUFFERED": "1"}


class WorkerProcess:
    """One process with one session; every method may raise `WorkerDied`."""

    def __init__(self, spec: SessionSpec, factory: str, log: Path):
        self._log = log
        ours, theirs = socket.socketpair()
        with ours, theirs, log.open("ab") as output:
            self._process = _start(theirs, environment(spec.threads, os.environ), output)
            self._connection: Connection = Connection(ours.detach())
        self._send(pack({"factory": factory, "spec": spec.as_json()}))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def session_failure(self) -> Failure | None:
        """Wait for the session: None when it stands, else why it cannot be built."""
        return self._failure_or_ready()

    def run(self, unit: Unit) -> UnitResult | Failure:
        """Run one unit and wait for its end."""
        for message in pack_unit(unit):
            self._send(message)
        failure = self._failure_or_ready()
        if failure is not None:
            return failure
        head = self._receive()
        try:
            return unpack_result(head, self._receive())
        except (ValueError, KeyError, TypeError) as error:
            raise WorkerDied(f"its answer cannot be read: {error}") from error

    def kill(self) -> None:
        """End the process now; a call that waits for it raises `WorkerDied`. Callable from any thread."""
        self._process.kill()

    def bury(self) -> None:
        """Make sure that it has ended, and close the socket."""
        self._connection.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def death(self) -> dict[str, Any]:
        """How it ended: exit code or signal, and the end of its log."""
        self.bury()
        code = self._process.returncode
        how = {"signal": signal.Signals(-code).name} if code < 0 else {"exit_code": code}
        return {**how, "log": self._log.name, "log_tail": _tail(self._log)}

    def _failure_or_ready(self) -> Failure | None:
        try:
            answer = unpack(self._receive())
            return Failure(**answer["failure"]) if "failure" in answer else None
        except (ValueError, KeyError, TypeError) as error:
            raise WorkerDied(f"its answer cannot be read: {error}") from error

    def _send(self, message: bytes) -> None:
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise WorkerDied(str(error)) from error

    def _receive(self) -> bytes:
        try:
            return self._connection.recv_bytes(MAXIMUM_BYTES)
        except (EOFError, OSError) as error:
            raise WorkerDied(str(error) or "its socket closed") from error


def _start(
    theirs: socket.socket, variables: Mapping[str, str], output: BinaryIO
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "service.executors.worker", str(theirs.fileno())]
    try:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(variables),
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    except OSError as error:
        raise WorkerDied(f"it cannot be started: {error}") from error


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
