"""Processes of the service in milliseconds: forks of one process that has imported everything.

What is forked runs a module as `python -m` would, with an environment, a log and a pid of its own; it is killed,
stopped and waited for like any other process. What such processes leave behind becomes the server's child
(Linux's subreaper), so `strays` knows every process that outlived its parent.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
PR_SET_CHILD_SUBREAPER = 36


class Forked:
    """The verbs of `subprocess.Popen` for a process that the server forked."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self.returncode: int | None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Not to whoever may have the pid once the process is gone."""
        if self.returncode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def end(self, status: int) -> None:
        self.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()


class ForkServer:
    """`launch` gives a running process; everything ends with `close`."""

    def __init__(self, modules: Iterable[str], environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self._lock, self._answers = threading.Lock(), threading.Semaphore(0)
        self._answer: Any = None
        self._living: dict[int, Forked] = {}
        self._early: dict[int, int] = {}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno()), *modules],
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )
        self._socket = ours
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def launch(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path
    ) -> Forked:
        """Run the module `command[0]` with the rest as its arguments."""
        asked = {
            "command": list(command), "environment": dict(environment), "log": str(log), "folder": str(folder)
        }  # fmt: skip
        with self._lock:
            pid = int(self._ask(asked))
            process = self._living[pid] = Forked(pid)
            if pid in self._early:
                self._living.pop(pid).end(self._early.pop(pid))
        return process

    def strays(self) -> list[int]:
        """The processes that were forked, or left behind by what was forked, and live."""
        with self._lock:
            return [int(pid) for pid in self._ask({"strays": True})]

    def close(self) -> None:
        """Kill everything that is left."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._reader.join()
        self._socket.close()

    def _ask(self, asked: Mapping[str, Any]) -> Any:
        self._socket.sendall(json.dumps(asked).encode() + b"\n")
        self._answers.acquire()
        if self._answer is None:
            raise RuntimeError(
                "The fork server must live. Got its end; its last words are on standard error."
            )
        return self._answer

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "ended" not in message:
                    self._answer = message["answer"]
                    self._answers.release()
                    continue
                process = self._living.pop(message["ended"], None)
                if process is None:
                    self._early[message["ended"]] = message["status"]
                else:
                    process.end(message["status"])
        self._answer = None
        self._answers.release()


def children_of(pid: int) -> list[int]:
    """The processes whose parent any thread of `pid` is."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in listing.read_text().split()]
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    """Whether the process runs, or is stopped: a zombie is neither."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def main(descriptor: int, modules: Sequence[str]) -> None:
    """Import `modules`, then fork what is asked for until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for module in modules:
        importlib.import_module(module)
    connection = socket.socket(fileno=descriptor)
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    rest = b""
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        if woken in ready:
            woken.recv(4096)
            _reap(connection)
        if connection in ready:
            received = connection.recv(65536)
            if not received:
                break
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                _serve(connection, json.loads(line), (woken, waker))
    _kill_all()


def _serve(
    connection: socket.socket, asked: Mapping[str, Any], pipe: tuple[socket.socket, socket.socket]
) -> None:
    if "strays" in asked:
        _say(connection, {"answer": [pid for pid in children_of(os.getpid()) if alive(pid)]})
        return
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        for end in (connection, *pipe):
            end.close()
        _become(asked)
    _say(connection, {"answer": pid})


def _become(asked: Mapping[str, Any]) -> NoReturn:
    status = 1
    try:
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(asked["folder"])
        random.seed()
        name, *arguments = asked["command"]
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)


def _reap(connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say(connection, {"ended": pid, "status": status})


def _say(connection: socket.socket, message: Mapping[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return


def _kill_all() -> None:
    """Children become ours when their parents die, so until there are none."""
    while found := children_of(os.getpid()):
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
