"""``bitplan doctor``: everything that a service on this machine needs, looked at once. Changes nothing."""

from __future__ import annotations

import os
import platform
import re
import stat
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from sqlalchemy import select

from service.checks import Check, readiness
from service.db.engine import Database, database_clock, parse_url
from service.executors.catalog import EXECUTORS
from service.executors.worker_process import gaps_here
from service.settings import Settings

CLOCK_SECONDS = 5.0
"""Clocks that are further apart than this are worth a warning."""
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+).*;.*extra == ['\"]([a-z]+)['\"]")


def examine(settings: Settings) -> tuple[Check, ...]:
    """Every check, in the order in which one would ask."""
    return (
        _python(),
        _guarded("torch", _torch),
        _guarded("solvers", _solvers),
        *_extras(),
        _executor(settings),
        _guarded("isolation", lambda: _isolation(settings)),
        _permissions(settings),
        *_service(settings),
    )


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Libraries fail to load in ways of their own: any exception is a finding."""
    try:
        return check()
    except Exception as error:
        return Check(name, "failed", f"{type(error).__name__}: {error}. Install Bitplan again.")


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    return Check("python", "ok", found)


def _torch() -> Check:
    import torch

    cuda = torch.version.cuda
    build = f"torch {torch.__version__}, {'CPU build' if cuda is None else f'CUDA {cuda}'}"
    if cuda is None:
        return Check("torch", "ok", build)
    if not torch.cuda.is_available():
        return Check("torch", "warning", f"{build}, but no device: jobs must say device cpu")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("torch", "ok", f"{build}: {', '.join(names)}")


def _solvers() -> Check:
    import highspy
    import pulp

    from search.solvers.ilp import BackendMissingError, cbc_path

    found = f"HiGHS {highspy.Highs().version()}, PuLP {pulp.__version__}"
    try:
        cbc_path()
    except BackendMissingError as error:
        return Check("solvers", "warning", f"{found}. {error}")
    return Check("solvers", "ok", f"{found}, CBC")


def _extras() -> Iterator[Check]:
    """The packages of each extra with their versions; none must be there."""
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("bitplan") or ():
        match = _REQUIREMENT.match(line)
        if match is not None and match[2] != "dev":
            extras.setdefault(match[2], []).append(match[1])
    for extra, packages in sorted(extras.items()):
        versions = {name: _version(name) for name in sorted(packages)}
        there = [f"{name} {version}" for name, version in versions.items() if version]
        lacking = [name for name, version in versions.items() if not version]
        hint = f"not installed: {', '.join(lacking)} (pip install 'bitplan[{extra}]')" if lacking else ""
        yield Check(f"extra {extra}", "ok", "; ".join(filter(None, (", ".join(there), hint))))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _executor(settings: Settings) -> Check:
    if settings.executor not in EXECUTORS:
        names = ", ".join(EXECUTORS)
        said = f"BITPLAN_EXECUTOR must be one of {names}. Got {settings.executor}."
        return Check("executor", "failed", said)
    return Check("executor", "ok", f"{settings.executor}, {settings.workers} workers")


def _isolation(settings: Settings) -> Check:
    """What stands between a stranger's model and this machine, as a worker that is started now finds it."""
    if settings.executor in EXECUTORS and not EXECUTORS[settings.executor].isolated:
        return Check("isolation", "warning", f"{settings.executor} runs models in the runner's own process")
    if settings.isolation == "off":
        return Check("isolation", "warning", "BITPLAN_ISOLATION=off: workers have network and files")
    gaps = gaps_here()
    if not gaps:
        return Check(
            "isolation", "ok", "workers have no network, and no files of the data directory but theirs"
        )
    return Check("isolation", "failed" if settings.isolation == "require" else "warning", "; ".join(gaps))


def _permissions(settings: Settings) -> Check:
    """Nobody else may write what the service reads, and the models of strangers should not run as root."""
    folder, key = settings.data_dir, settings.data_dir / "cursor.key"
    if not folder.exists():
        return Check("permissions", "warning", f"{folder} does not exist yet. `bitplan migrate` makes it.")
    found = []
    if folder.stat().st_mode & stat.S_IWOTH:
        found.append(f"everybody can write {folder}: chmod o-w")
    if key.exists() and key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        found.append(f"others can read {key}: chmod 600")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Check("permissions", "failed", f"{folder} cannot be written. Correct its owner.")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        found.append("this is root: run the service as a user of its own")
    return Check("permissions", "warning" if found else "ok", "; ".join(found) or str(folder))


def _service(settings: Settings) -> Iterator[Check]:
    """Database, schema, store, runners, clock. A SQLite file that is not there is not made."""
    url = parse_url(settings.database_url)
    if url.drivername == "sqlite" and not Path(str(url.database)).exists():
        yield Check("database", "warning", f"{url.database} does not exist yet. `bitplan migrate` makes it.")
        return
    if not settings.data_dir.exists():
        said = f"{settings.data_dir} does not exist yet. `bitplan migrate` makes it."
        yield Check("store", "warning", said)
        return
    database = Database(settings.database_url)
    try:
        found = readiness(settings, database)
        yield from found
        if found[0].state == "ok":
            yield _clock(database)
    finally:
        database.close()


def _clock(database: Database) -> Check:
    """Leases go by the database's clock, retention and what people read by this machine's."""
    with database.read() as session:
        before = time.time()
        theirs = session.scalars(select(database_clock())).one()
        apart = theirs - (before + time.time()) / 2
    if abs(apart) > CLOCK_SECONDS:
        return Check(
            "clock", "warning", f"{apart:+.1f} s from here to the database. Synchronize both clocks."
        )
    return Check("clock", "ok", f"{apart:+.3f} s from here to the database")
