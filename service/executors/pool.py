"""Units for several workers at once: one queue, and one thread that attends each worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, Queue, SimpleQueue
from typing import Protocol

from sensitivity.units import Unit, UnitResult
from service.executors.protocol import Failure, Outcome

Item = tuple[str, Unit] | None


class Keeper(Protocol):
    """Keeps one worker alive, wherever that is. `kill` is called from other threads, the rest from one."""

    leaving_seconds: float
    """How long an idle worker may take to leave by itself before it is killed."""

    @property
    def pid(self) -> int | None:
        """The worker's process, if it has one on this machine."""
        ...

    def prepare(self) -> None:
        """Called before a unit is taken from the queue: wait for a worker, where waiting is long. What goes
        wrong is told by `attempt`.
        """
        ...

    def attempt(self, unit: Unit, began: Callable[[], None], /) -> UnitResult | Failure | None:
        """What became of the unit; `began` is called when a worker is about to run it. None when there is no
        worker any more, so that another keeper may have the unit.
        """
        ...

    def kill(self) -> None:
        """Make an `attempt` or `prepare` in progress end soon, and the worker with it."""
        ...

    def end(self) -> None:
        """Let the worker go."""
        ...


class Pool:
    """`capacity` keepers, each in a thread, that take units from one queue. Used by one thread.

    `began` is told, in any thread, the key of each unit that a worker is about to run.
    """

    def __init__(
        self, capacity: int, make: Callable[[int], Keeper], began: Callable[[str], None] = lambda key: None
    ):
        self.capacity = capacity
        self._make, self._began = make, began
        self._queue: Queue[Item] = Queue()
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._attendants: list[_Attendant] = []

    def submit(self, key: str, unit: Unit) -> None:
        """Queue a unit; the workers start with the first one."""
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

    def close(self, grace_seconds: float) -> None:
        """See `Executor`."""
        self._drop_queued()
        for attendant in self._attendants:
            attendant.closing.set()
            self._queue.put(None)
        deadline = time.monotonic() + grace_seconds
        for attendant in self._attendants:
            attendant.join(deadline)
        self._attendants = []

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The processes of this machine that live now."""
        return tuple(pid for attendant in self._attendants if (pid := attendant.keeper.pid) is not None)

    def _attend(self) -> None:
        for slot in range(self.capacity):
            attendant = _Attendant(self._make(slot), slot, self._queue, self._outcomes, self._began)
            self._attendants.append(attendant)
            attendant.start()

    def _drop_queued(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            return


class _Attendant:
    """One thread that passes unit after unit to one keeper."""

    def __init__(
        self,
        keeper: Keeper,
        slot: int,
        queue: Queue[Item],
        outcomes: SimpleQueue[Outcome],
        began: Callable[[str], None],
    ):
        self.keeper = keeper
        self._queue, self._outcomes, self._began = queue, outcomes, began
        self._busy = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"worker-{slot}", daemon=True)
        self.closing = threading.Event()

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def join(self, deadline: float) -> None:
        """Wait for the unit in progress until `deadline` (monotonic), then kill the worker."""
        if self._busy.is_set():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        else:
            self._thread.join(self.keeper.leaving_seconds)
        while self._thread.is_alive():
            self.keeper.kill()
            self._thread.join(0.05)

    def _serve(self) -> None:
        while not self.closing.is_set():
            self.keeper.prepare()
            if self.closing.is_set() or (item := self._queue.get()) is None:
                break
            self._busy.set()
            self._run(*item)
            self._busy.clear()
        self.keeper.end()

    def _run(self, key: str, unit: Unit) -> None:
        answer = self.keeper.attempt(unit, lambda: self._began(key))
        if answer is None:
            self._queue.put((key, unit))
        elif isinstance(answer, UnitResult):
            self._outcomes.put(Outcome(key, result=answer))
        elif answer.kind != "worker_crash" or not self.closing.is_set():
            self._outcomes.put(Outcome(key, failure=answer))
