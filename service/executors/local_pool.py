"""A pool of worker processes on this machine, each attended by one thread of the runner."""

import os
import threading
import time
from pathlib import Path
from queue import Empty, Queue, SimpleQueue

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit
from service.executors.messages import failure_of
from service.executors.protocol import ExecutorSettings, Failure, Outcome
from service.executors.worker_process import WorkerDied, WorkerProcess

Item = tuple[str, Unit] | None


class LocalPool:
    """Workers that die are replaced; the unit they held comes back as `worker_crash`."""

    name = "local_pool"

    def __init__(self, settings: ExecutorSettings):
        self.capacity = settings.workers
        self._settings = settings
        self._spec: SessionSpec | None = None
        self._queue: Queue[Item] = Queue()
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._attendants: list[_Attendant] = []

    def start(self, spec: SessionSpec) -> None:
        """See `Executor`; the workers start with the first unit, because there may be none."""
        self._spec = spec

    def submit(self, key: str, unit: Unit) -> None:
        """See `Executor`."""
        if not self._attendants:
            self._attend()
        self._queue.put((key, unit))

    def wait(self, timeout: float) -> list[Outcome]:
        """See `Executor`."""
        outcomes: list[Outcome] = []
        try:
            outcomes.append(
                self._outcomes.get(timeout=timeout) if timeout > 0 else self._outcomes.get_nowait()
            )
            while True:
                outcomes.append(self._outcomes.get_nowait())
        except Empty:
            return outcomes

    def close(self, grace_seconds: float = 10.0) -> None:
        """See `Executor`."""
        self._drop_queued()
        for attendant in self._attendants:
            attendant.closing.set()
            self._queue.put(None)
        deadline = time.monotonic() + grace_seconds
        for attendant in self._attendants:
            attendant.join(deadline)
        self._attendants, self._spec = [], None

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The processes that live now."""
        return tuple(pid for attendant in self._attendants if (pid := attendant.pid) is not None)

    def _attend(self) -> None:
        if self._spec is None:
            raise RuntimeError("An executor must be started before it is used. Call start(spec).")
        self._settings.log_folder.mkdir(parents=True, exist_ok=True)
        for slot in range(self.capacity):
            attendant = _Attendant(self._settings, self._spec, slot, self._queue, self._outcomes)
            self._attendants.append(attendant)
            attendant.start()

    def _drop_queued(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            return


class _Attendant:
    """One thread that keeps one worker alive and passes it unit after unit."""

    def __init__(
        self,
        settings: ExecutorSettings,
        spec: SessionSpec,
        slot: int,
        queue: "Queue[Item]",
        outcomes: "SimpleQueue[Outcome]",
    ):
        self._spec, self._settings = spec, settings
        self._log: Path = settings.log_folder / f"worker-{os.getpid()}-{slot}.log"
        self._queue, self._outcomes = queue, outcomes
        self._worker: WorkerProcess | None = None
        self._broken: Failure | None = None
        self._busy = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"worker-{slot}", daemon=True)
        self.closing = threading.Event()

    @property
    def pid(self) -> int | None:
        """The worker's process, if it has one."""
        return None if self._worker is None else self._worker.pid

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def join(self, deadline: float) -> None:
        """Wait for the unit in progress until `deadline` (monotonic), then kill the worker."""
        if self._busy.is_set():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        while self._thread.is_alive():
            worker = self._worker
            if worker is not None:
                worker.kill()
            self._thread.join(0.05)

    def _serve(self) -> None:
        try:
            self._prepare()
        except Exception:  # the first unit will meet it again, and report it
            self._replace()
        while not self.closing.is_set() and (item := self._queue.get()) is not None:
            self._busy.set()
            outcome = self._attempt(*item)
            self._busy.clear()
            if outcome is not None:
                self._outcomes.put(outcome)
        self._replace()
        if self._log.exists() and self._log.stat().st_size == 0:
            self._log.unlink()

    def _attempt(self, key: str, unit: Unit) -> Outcome | None:
        """What became of the unit; None when it was killed because the pool closes."""
        try:
            self._prepare()
            if self._broken is not None or self._worker is None:
                return Outcome(key, failure=self._broken)
            answer = self._worker.run(unit)
        except WorkerDied as error:
            if self.closing.is_set():
                return None
            return Outcome(key, failure=self._crash(error))
        except Exception as error:
            return Outcome(key, failure=failure_of(error, "unit_error"))
        if isinstance(answer, Failure):
            return Outcome(key, failure=answer)
        return Outcome(key, result=answer)

    def _prepare(self) -> None:
        """Have a worker with a session, unless the session cannot be built (which is tried once)."""
        if self._worker is not None or self._broken is not None or self.closing.is_set():
            return
        self._worker = WorkerProcess(
            self._spec, self._settings.session_factory, self._log, self._settings.isolation
        )
        self._broken = self._worker.session_failure()
        if self._worker.gaps:
            self._settings.on_gaps(self._worker.gaps)
        if self._broken is not None:
            self._replace()

    def _crash(self, error: WorkerDied) -> Failure:
        worker, self._worker = self._worker, None
        if worker is None:
            return Failure("worker_crash", f"A worker must start. Got: {error}.", {"error": str(error)})
        return worker.death()

    def _replace(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.bury()
