"""EXECUTORS: where measurements can run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from service.executors.in_process import InProcess
from service.executors.local_pool import LocalPool
from service.executors.protocol import Executor, ExecutorSettings


@dataclass(frozen=True)
class ExecutorKind:
    """One entry: `isolated` executors survive the death of the code that they run."""

    name: str
    make: Callable[[ExecutorSettings], Executor]
    isolated: bool
    summary: str


EXECUTORS: Mapping[str, ExecutorKind] = {
    kind.name: kind
    for kind in (
        ExecutorKind("in_process", InProcess, False, "in the runner's own process: tests and notebooks"),
        ExecutorKind("local_pool", LocalPool, True, "a pool of supervised processes on this machine"),
    )
}


def make_executor(name: str, settings: ExecutorSettings) -> Executor:
    """A new executor that is not started. Raises ValueError for a name that is not in the catalog."""
    if name not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}. Got {name!r}.")
    return EXECUTORS[name].make(settings)
