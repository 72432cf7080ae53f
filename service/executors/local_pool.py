"""A pool of worker processes on this machine, each attended by one thread of the runner."""

import os

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit
from service.executors.keeper import LocalKeeper
from service.executors.pool import Pool
from service.executors.protocol import ExecutorSettings, Outcome


class LocalPool:
    """Workers that die are replaced; the unit they held comes back as `worker_crash`."""

    name = "local_pool"

    def __init__(self, settings: ExecutorSettings):
        self.capacity = settings.workers
        self._settings = settings
        self._spec: SessionSpec | None = None
        self._pool = Pool(self.capacity, self._keeper)

    def start(self, spec: SessionSpec) -> None:
        """See `Executor`; the workers start with the first unit, because there may be none."""
        self._spec = spec

    def submit(self, key: str, unit: Unit) -> None:
        """See `Executor`."""
        self._pool.submit(key, unit)

    def wait(self, timeout: float) -> list[Outcome]:
        """See `Executor`."""
        return self._pool.wait(timeout)

    def close(self, grace_seconds: float = 10.0) -> None:
        """See `Executor`."""
        self._pool.close(grace_seconds)
        self._spec = None

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The processes that live now."""
        return self._pool.worker_pids

    def _keeper(self, slot: int) -> LocalKeeper:
        if self._spec is None:
            raise RuntimeError("An executor must be started before it is used. Call start(spec).")
        settings = self._settings
        settings.log_folder.mkdir(parents=True, exist_ok=True)
        log = settings.log_folder / f"worker-{os.getpid()}-{slot}.log"
        return LocalKeeper(self._spec, settings.session_factory, log, settings.isolation, settings.on_gaps)
