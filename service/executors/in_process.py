"""Runs units in this very process: for tests and notebooks. A crash of the model's code is a crash of the
caller.
"""

from collections import deque

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit, UnitResult
from service.executors import sessions
from service.executors.messages import failure_of, pack_result, unpack_result
from service.executors.protocol import ExecutorSettings, Failure, Outcome, Session


class InProcess:
    """One unit per `wait`, in the order of submission."""

    name = "in_process"
    capacity = 1

    def __init__(self, settings: ExecutorSettings):
        self._factory = settings.session_factory
        self._queue: deque[tuple[str, Unit]] = deque()
        self._spec: SessionSpec | None = None
        self._session: Session | None = None
        self._broken: Failure | None = None

    def start(self, spec: SessionSpec) -> None:
        """See `Executor`; the session is built by the first `wait`."""
        self._spec = spec

    def submit(self, key: str, unit: Unit) -> None:
        """See `Executor`."""
        self._queue.append((key, unit))

    def wait(self, timeout: float) -> list[Outcome]:
        """See `Executor`; runs one unit to its end, however long that takes."""
        if not self._queue:
            return []
        key, unit = self._queue.popleft()
        session = self._ready_session()
        if session is None:
            return [Outcome(key, failure=self._broken)]
        try:
            return [Outcome(key, result=_isolated(session.run(unit)))]
        except Exception as error:
            return [Outcome(key, failure=failure_of(error, "unit_error"))]

    def close(self, grace_seconds: float = 10.0) -> None:
        """See `Executor`."""
        self._queue.clear()
        self._session = None

    def _ready_session(self) -> Session | None:
        if self._spec is None:
            raise RuntimeError("An executor must be started before it is waited for. Call start(spec).")
        if self._session is None and self._broken is None:
            try:
                self._session = sessions.build(self._factory, self._spec)
            except Exception as error:
                self._broken = failure_of(error, "bad_input")
        return self._session


def _isolated(result: UnitResult) -> UnitResult:
    """The result as it would come out of another process: same values, same types, same refusals."""
    return unpack_result(*pack_result(result))
