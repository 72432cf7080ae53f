"""What an executor is: it builds one session per worker and runs units in them. Front: no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit, UnitResult
from service.executors.confine import Isolation
from service.executors.ray_settings import RaySettings

FailureKind = Literal["worker_crash", "out_of_memory", "bad_input", "unit_error", "not_isolated"]
DEFAULT_SESSION = "sensitivity.session:Session"


@dataclass(frozen=True)
class Failure:
    """Why a unit has no result.

    worker_crash   the worker died (`detail` has its exit code or signal and the end of its log): may be
                   tried again
    out_of_memory  the unit asked for more memory than there is
    bad_input      the session could not be built: no unit can run
    unit_error     the unit raised: it would raise again
    not_isolated   this machine cannot keep workers apart as strictly as its operator requires

    `detail["error"]` is the stable kind of a `SessionError`, or the exception's class name.
    """

    kind: FailureKind
    message: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, for the database."""
        return {"kind": self.kind, "message": self.message, "detail": dict(self.detail)}


@dataclass(frozen=True)
class Outcome:
    """What became of the unit submitted under `key`: exactly one of `result` and `failure`."""

    key: str
    result: UnitResult | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class ExecutorSettings:
    """What every executor is made from.

    `session_factory` is "package.module:callable", called with the `SessionSpec` inside the worker; its
    `run(unit)` gives a `UnitResult`. `log_folder` receives what workers print. `on_gaps` is told, in any
    thread, what a worker that has started is not kept from, if there is anything; in the caller's own process
    nothing is kept from anything. `ray` is for the executor of that name.
    """

    workers: int
    log_folder: Path
    session_factory: str = DEFAULT_SESSION
    isolation: Isolation = field(default_factory=Isolation)
    on_gaps: Callable[[tuple[str, ...]], None] = lambda gaps: None
    ray: RaySettings = field(default_factory=RaySettings)


class ExecutorAway(Exception):  # noqa: N818 - says what happened
    """The machines that would run units do not answer; the units are not to blame. Says what to do."""


class Session(Protocol):
    """What a session factory returns."""

    def run(self, unit: Unit, /) -> UnitResult:
        """Run one unit; the same unit gives the same result."""
        ...


class Executor(Protocol):
    """Runs units somewhere. Each submitted unit yields exactly one outcome, in any order, unless `close`
    comes first.

    Used by one thread. ``start`` once, then ``submit`` and ``wait`` as often as needed, then ``close``.
    """

    name: str
    capacity: int

    def start(self, spec: SessionSpec) -> None:
        """Say what sessions to build; does not wait for them."""
        ...

    def submit(self, key: str, unit: Unit) -> None:
        """Queue a unit; returns at once."""
        ...

    def wait(self, timeout: float) -> list[Outcome]:
        """The outcomes that have come, after waiting at most `timeout` seconds for the first one.

        Raises `ExecutorAway` when there is nothing that could run units, for so long that the job should be
        given back.
        """
        ...

    def close(self, grace_seconds: float = 10.0) -> None:
        """Drop queued units, give running ones `grace_seconds` to end, then kill the workers. May be called
        twice.

        What ended within the grace can still be fetched with ``wait(0)``.
        """
        ...
