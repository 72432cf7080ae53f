"""EXECUTORS: where measurements can run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from service.executors.in_process import InProcess
from service.executors.local_pool import LocalPool
from service.executors.protocol import Executor, ExecutorSettings
from service.executors.ray_cluster import ray_executor
from service.executors.ray_settings import ray_lacks
from service.settings import Settings


@dataclass(frozen=True)
class ExecutorKind:
    """One entry: `isolated` executors survive the death of the code that they run; `lacks` says what the
    operator must do before one can be used, None when nothing.
    """

    name: str
    make: Callable[[ExecutorSettings], Executor]
    isolated: bool
    summary: str
    lacks: Callable[[Settings], str | None] = lambda settings: None


EXECUTORS: Mapping[str, ExecutorKind] = {
    kind.name: kind
    for kind in (
        ExecutorKind("in_process", InProcess, False, "in the runner's own process: tests and notebooks"),
        ExecutorKind("local_pool", LocalPool, True, "a pool of supervised processes on this machine"),
        ExecutorKind(
            "ray", ray_executor, True, "actors of a Ray cluster that supervise such processes", ray_lacks
        ),
    )
}


def require_usable(settings: Settings) -> None:
    """Raise ValueError with what to do where the executor that the settings name cannot be used."""
    if settings.executor not in EXECUTORS:
        names = ", ".join(EXECUTORS)
        raise ValueError(f"BITPLAN_EXECUTOR must be one of {names}. Got {settings.executor!r}.")
    lacking = EXECUTORS[settings.executor].lacks(settings)
    if lacking is not None:
        raise ValueError(lacking)


def make_executor(name: str, settings: ExecutorSettings) -> Executor:
    """A new executor that is not started. Raises ValueError for a name that is not in the catalog."""
    if name not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}. Got {name!r}.")
    return EXECUTORS[name].make(settings)
