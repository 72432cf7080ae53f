"""``bitplan doctor``: everything that a service on this machine needs, looked at once. Changes nothing."""

from __future__ import annotations

import os
import platform
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from sqlalchemy import select

from service.checks import Check, readiness
from service.db.engine import Database, database_clock, parse_url
from service.executors.catalog import EXECUTORS, require_usable
from service.executors.ray_cluster import probe
from service.executors.ray_scorer import versions
from service.executors.ray_settings import ray_lacks, ray_of
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
        *_workers(settings),
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
    try:
        require_usable(settings)
    except ValueError as error:
        return Check("executor", "failed", str(error))
    return Check("executor", "ok", f"{settings.executor}, {settings.workers} workers")


def _workers(settings: Settings) -> Iterator[Check]:
    """What stands between a stranger's model and the machine that it runs on."""
    if settings.executor == "ray" and ray_lacks(settings) is None:
        yield from _cluster(settings)
    else:
        yield _guarded("isolation", lambda: _isolation(settings))


def _cluster(settings: Settings) -> Iterator[Check]:
    """The nodes of the Ray cluster: that they answer, are alike, and keep workers apart."""
    try:
        found = probe(ray_of(settings))
    except subprocess.CalledProcessError as error:
        why = next(reversed(str(error.stderr).strip().splitlines()), "no reason")
        found = {"away": f"The Ray cluster at {settings.ray_address} must answer. Got: {why}"}
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        found = {"away": f"The Ray cluster at {settings.ray_address} must answer. Got: {error}"}
    if "away" in found:
        yield Check("ray", "failed", found["away"])
        return
    nodes = found["nodes"]
    counted = {name: sum(node[name] for node in nodes) for name in ("CPU", "GPU")}
    said = f"{len(nodes)} nodes with {counted['CPU']:g} CPUs and {counted['GPU']:g} GPUs"
    if settings.ray_auth == "disabled":
        yield Check("ray", "warning", f"{said}; BITPLAN_RAY_AUTH=disabled: who connects may run code")
    elif not counted["CPU"]:
        yield Check("ray", "warning", f"{said}: jobs wait until a node with CPUs joins")
    else:
        yield Check("ray", "ok", said)
    for node in nodes:
        if node["CPU"]:
            yield _node(settings, node)


def _node(settings: Settings, node: Mapping[str, Any]) -> Check:
    name = f"node {node['host']}"
    if "error" in node:
        return Check(name, "failed", f"A node must answer. Got {node['error']}")
    ours = versions()
    if node["versions"] != ours:
        differing = [key for key in ours if node["versions"].get(key) != ours[key]]
        return Check(name, "failed", f"other versions than here: {', '.join(differing)}. Install the same.")
    said = f"cache {node['cache']}, {node['free'] / 2**30:.1f} GiB are free"
    gaps = "" if settings.isolation == "off" else "; ".join(node["gaps"])
    if gaps:
        return Check(name, "failed" if settings.isolation == "require" else "warning", f"{said}; {gaps}")
    return Check(name, "ok", said)


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
