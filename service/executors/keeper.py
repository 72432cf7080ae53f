"""Keeps one worker process alive and has it run unit after unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit, UnitResult
from service.executors.confine import Isolation
from service.executors.messages import failure_of
from service.executors.protocol import Failure
from service.executors.worker_process import WorkerDied, WorkerProcess


class LocalKeeper:
    """A worker of this machine. One that dies is replaced; the unit it held failed as `worker_crash`.

    `kill` and `pid` may be used from any thread, everything else from one.
    """

    leaving_seconds = 0.0

    def __init__(
        self,
        spec: SessionSpec,
        factory: str,
        log: Path,
        isolation: Isolation,
        on_gaps: Callable[[tuple[str, ...]], None],
    ):
        self._spec, self._factory, self._log, self._isolation = spec, factory, log, isolation
        self._on_gaps = on_gaps
        self._worker: WorkerProcess | None = None
        self._broken: Failure | None = None
        self._prepared = False

    @property
    def pid(self) -> int | None:
        """The worker's process, if it has one."""
        return None if self._worker is None else self._worker.pid

    def prepare(self) -> None:
        """Start a worker before the first unit; later ones start with the unit that needs them."""
        if self._prepared:
            return
        self._prepared = True
        try:
            self._prepare()
        except Exception:  # the first unit will meet it again, and report it
            self._drop()

    def attempt(self, unit: Unit, began: Callable[[], None] = lambda: None) -> UnitResult | Failure:
        """What became of the unit; `began` is called when a worker is about to run it."""
        try:
            self._prepare()
            if self._worker is None:
                assert self._broken is not None
                return self._broken
            began()
            return self._worker.run(unit)
        except WorkerDied as error:
            return self._crash(error)
        except Exception as error:
            return failure_of(error, "unit_error")

    def kill(self) -> None:
        """End the worker now: a unit in progress fails."""
        worker = self._worker
        if worker is not None:
            worker.kill()

    def end(self) -> None:
        """Let the worker go; its log too, if nothing is in it."""
        self._drop()
        if self._log.exists() and self._log.stat().st_size == 0:
            self._log.unlink()

    def _prepare(self) -> None:
        """Have a worker with a session, unless the session cannot be built, which is tried once."""
        if self._worker is not None or self._broken is not None:
            return
        self._worker = WorkerProcess(self._spec, self._factory, self._log, self._isolation)
        self._broken = self._worker.session_failure()
        if self._worker.gaps:
            self._on_gaps(self._worker.gaps)
        if self._broken is not None:
            self._drop()

    def _crash(self, error: WorkerDied) -> Failure:
        worker, self._worker = self._worker, None
        if worker is None:
            return Failure("worker_crash", f"A worker must start. Got: {error}.", {"error": str(error)})
        return worker.death()

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.bury()
