"""What the operator's settings mean for the process that runs a stranger's model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from search.budget import parse_bytes
from sensitivity.spec import SessionSpec
from service.db.engine import parse_url
from service.executors.confine import Isolation
from service.failpoints import ONCE_VARIABLE
from service.settings import Settings

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
"""Drivers of GPUs reserve far more addresses than they use."""
CONTAINER_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container reads how much memory it may have, by versions 2 and 1 of cgroups."""


def isolation_of(settings: Settings) -> Isolation:
    """What the operator chose; the data directory, an SQLite database and files of secrets are closed."""
    url = parse_url(settings.database_url)
    files = [f"{url.database}{end}" for end in ("", "-wal", "-shm")] if url.drivername == "sqlite" else []
    files += [settings.ray_token_file] if settings.ray_token_file else []
    hours = settings.worker_cpu_hours
    return Isolation(
        mode=settings.isolation,
        memory_bytes=_memory(settings),
        cpu_seconds=max(1, int(hours * 3600)) if hours else None,
        file_bytes=parse_bytes(settings.worker_file) if settings.worker_file else None,
        processes=settings.worker_processes or None,
        closed=tuple(
            os.path.realpath(place)
            for place in map(str, (settings.data_dir, *files, *settings.worker_closed))
        ),
    )


def for_session(isolation: Isolation, spec: SessionSpec, own: Path) -> Isolation:
    """As it holds for a worker with a session of `spec` and its `own` folder for temporary files.

    The model is closed but for reading. Weights that are mapped from its files do not count as memory, and
    each thread has the CPU time.
    """
    model = _real(spec.model.location)
    data = [spec.calibration, *([] if spec.statistics is None else [spec.statistics.calibration])]
    memory, cpu = isolation.memory_bytes, isolation.cpu_seconds
    return replace(
        isolation,
        memory_bytes=None if memory is None else memory + _bytes_below(Path(spec.model.location)),
        cpu_seconds=None if cpu is None else cpu * spec.threads,
        closed=(*isolation.closed, *model),
        readable=(*model, *(place for source in data for place in _real(source.path))),
        writable=(*isolation.writable, os.path.realpath(own), *_real(os.environ.get(ONCE_VARIABLE, ""))),
    )


def _memory(settings: Settings) -> int | None:
    """The operator's limit, or this machine's memory."""
    return parse_bytes(settings.worker_memory) if settings.worker_memory else memory_of_machine()


def memory_of_machine() -> int | None:
    """The memory of this machine or container; None beside a GPU."""
    if any(os.path.exists(file) for file in GPU_FILES):
        return None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(most for file in CONTAINER_FILES if (most := _number_in(file)))])


def _number_in(file: str) -> int | None:
    """The number that a file of the kernel holds; None for none, or "max"."""
    try:
        return int(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _real(place: str) -> tuple[str, ...]:
    """The real path of what is there, or none: a factory of the user's is no place."""
    return (os.path.realpath(place),) if place and os.path.exists(place) else ()


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
