"""The runner's end of one worker process: start it, ask it, learn how it died."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit, UnitResult
from service import failpoints
from service.executors.confine import Isolation
from service.executors.isolation import for_session
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
CONFINE = "service.executors.confine"
PROBE_SECONDS = 60
NOT_ISOLATED = (
    "Workers must be isolated from network and files (BITPLAN_ISOLATION=require). Got one with: {}. Correct"
    " what `bitplan doctor` names, or say BITPLAN_ISOLATION=prefer."
)
CPU_TIME = (
    "A unit must end within {} s of CPU time. Got one that went on. Look for a model that never ends,"
    " or raise BITPLAN_WORKER_CPU_HOURS."
)


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

    def __init__(self, spec: SessionSpec, factory: str, log: Path, isolation: Isolation):
        self._log, self._cpu_seconds = log, (isolation.cpu_seconds or 0) * spec.threads
        self._own = Path(tempfile.mkdtemp(prefix="bitplan-worker-"))
        self._strict = isolation.mode == "require"
        self.gaps: tuple[str, ...] = ()
        variables = {**environment(spec.threads, os.environ), "TMPDIR": str(self._own)}
        ours, theirs = socket.socketpair()
        with ours, theirs, log.open("ab") as output:
            self._process = _start(theirs, for_session(isolation, spec, self._own), variables, output)
            self._connection: Connection = Connection(ours.detach())
        self._send(pack({"factory": factory, "spec": spec.as_json()}))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def session_failure(self) -> Failure | None:
        """Wait for the session: None when it stands, else why it cannot be built. Then `gaps` says what the
        worker is not kept from.
        """
        self.gaps = tuple(str(gap) for gap in self._answer().get("gaps", ()))
        if self.gaps and self._strict:
            return Failure("not_isolated", NOT_ISOLATED.format("; ".join(self.gaps)), {"gaps": [*self.gaps]})
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
        """Make sure that it has ended, and close the socket; its temporary files go."""
        self._connection.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._own, ignore_errors=True)

    def death(self) -> Failure:
        """How it ended: exit code or signal, and the end of its log."""
        self.bury()
        code = self._process.returncode
        how = {"signal": signal.Signals(-code).name} if code < 0 else {"exit_code": code}
        detail = {**how, "log": self._log.name, "log_tail": tail_of(self._log)}
        if code == -signal.SIGXCPU:
            said = CPU_TIME.format(self._cpu_seconds)
            return Failure("unit_error", said, {**detail, "error": "cpu_time"})
        name = how.get("signal") or f"exit code {code}"
        return Failure("worker_crash", f"The worker must survive the unit. Got its death ({name}).", detail)

    def _failure_or_ready(self) -> Failure | None:
        answer = self._answer()
        try:
            return Failure(**answer["failure"]) if "failure" in answer else None
        except TypeError as error:
            raise WorkerDied(f"its answer cannot be read: {error}") from error

    def _answer(self) -> dict[str, Any]:
        try:
            return unpack(self._receive())
        except ValueError as error:
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
    theirs: socket.socket, isolation: Isolation, variables: Mapping[str, str], output: BinaryIO
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", CONFINE, str(theirs.fileno()), isolation.as_json()]
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


def gaps_here() -> tuple[str, ...]:
    """What a worker on this machine would not be kept from, as one that starts and ends at once says.

    Raises OSError, ValueError or subprocess.SubprocessError where none starts.
    """
    command = [sys.executable, "-P", "-m", CONFINE]
    variables = environment(1, os.environ)
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        command, env=variables, capture_output=True, check=True, timeout=PROBE_SECONDS
    )
    return tuple(json.loads(done.stdout))


def tail_of(log: Path) -> str:
    """The end of a log, "" where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
