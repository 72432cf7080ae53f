"""What runs on a node of a Ray cluster: an actor that supervises one confined worker process.

A stranger's model never runs in the actor itself: that process has Ray's token, and unpickles what it is
sent. Its child is the same worker as that of the local pool.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from search.budget import parse_bytes
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import UnitResult
from service.executors.confine import Isolation
from service.executors.isolation import memory_of_machine
from service.executors.keeper import LocalKeeper
from service.executors.messages import pack, pack_result, unpack_unit
from service.executors.node_cache import DATA, Arrival, CacheFull, Coming, Kind, NodeCache, NotWhatWasAsked
from service.executors.worker_process import gaps_here
from service.settings import Settings
from service.store.durable import make_folder

Claimed = Literal["here", "send", "busy"]
Answer = tuple[Literal["closed", "result", "failure"], bytes, bytes, tuple[str, ...]]
VERSIONS = ("bitplan", "torch", "transformers")
"""Packages whose versions are part of what a score means, or of what a message does."""


def versions() -> dict[str, str]:
    """What must be the same on every node."""
    return {name: version(name) for name in VERSIONS}


def examine() -> dict[str, Any]:
    """What `bitplan doctor` wants to know of a node."""
    settings = Settings()
    make_folder(settings.ray_cache)
    free = shutil.disk_usage(settings.ray_cache).free
    return {"versions": versions(), "gaps": list(gaps_here()), "cache": str(settings.ray_cache), "free": free}


class Scorer:
    """One worker slot of a node. All methods are called by one thread of one runner, in order.

    factory       of sessions
    isolation     JSON of `Isolation`; the node adds its own closed places, and its own memory
    memory_bytes  of a worker, if the operator said so
    shared_store  the runner's data directory is here too, at the same place
    """

    def __init__(self, factory: str, isolation: str, memory_bytes: int | None, shared_store: bool):
        settings = Settings()
        limit = parse_bytes(settings.ray_cache_limit) if settings.ray_cache_limit else None
        self._cache = NodeCache(settings.ray_cache, limit)
        self._own = _own_folder(self._cache.folder / "workers")
        logs = _folder_of_logs(self._cache.folder / "logs", settings.keep_logs_days)
        self._log = logs / f"worker-{os.getpid()}-{os.urandom(3).hex()}.log"
        self._factory = factory
        closed = (*map(str, settings.worker_closed), str(self._cache.folder), *_places_of_ray())
        self._isolation = _here(Isolation.from_json(isolation), memory_bytes, shared_store, closed)
        self._arrival: Arrival | None = None
        self._keeper: LocalKeeper | None = None
        self._gaps: tuple[str, ...] = ()

    def about(self) -> dict[str, Any]:
        """Where this is, which versions are installed there, and whether a session is open."""
        opened = self._keeper is not None
        return {"host": socket.gethostname(), "versions": versions(), "open": opened}

    def claim(self, digest: str) -> Claimed:
        """Whether what the digest names is here, is to be sent, or is being received by another slot."""
        if self._arrival is not None:
            self._drop_arrival()
        if self._cache.hold(digest):
            return "here"
        self._arrival = self._cache.fetch(digest)
        return "busy" if self._arrival is None else "send"

    def expect(self, files: Sequence[tuple[str, int]]) -> str:
        """Say what will come; "" or why there is no room for it."""
        assert self._arrival is not None
        try:
            self._arrival.expect([Coming(name, size) for name, size in files])
        except CacheFull as full:
            self._drop_arrival()
            return str(full)
        return ""

    def receive(self, piece: bytes) -> None:
        """The next bytes; `finish` tells what is wrong with them."""
        assert self._arrival is not None
        with suppress(NotWhatWasAsked):
            self._arrival.receive(piece)

    def finish(self, kind: Kind) -> str:
        """Make what has come usable; "" or why it is not what was asked for."""
        assert self._arrival is not None
        try:
            self._arrival.finish(kind)
        except NotWhatWasAsked as other:
            self._drop_arrival()
            return str(other)
        self._arrival = None
        return ""

    def open(self, spec: str) -> tuple[str, ...]:
        """Start a worker with a session of this spec (JSON); what it is not kept from."""
        self._end_worker()
        here = localized(SessionSpec.from_json(json.loads(spec)), self._cache)
        self._keeper = LocalKeeper(here, self._factory, self._log, self._isolation, self._note)
        self._keeper.prepare()
        return self._gaps

    def run(self, head: bytes, arrays: bytes) -> Answer:
        """Run one unit (`messages.pack_unit`): a packed result, or a failure as JSON, and the gaps."""
        if self._keeper is None:  # Ray has restarted this actor
            return "closed", b"", b"", ()
        answer = self._keeper.attempt(unpack_unit(head, arrays))
        if isinstance(answer, UnitResult):
            return "result", *pack_result(answer), self._gaps
        detail = {**answer.detail, "node": socket.gethostname()}
        return "failure", pack(replace(answer, detail=detail).as_json()), b"", self._gaps

    def end(self) -> None:
        """Let the worker go, and everything of it but its log."""
        self._end_worker()
        self._drop_arrival()
        self._cache.release()
        shutil.rmtree(self._own, ignore_errors=True)

    def _note(self, gaps: tuple[str, ...]) -> None:
        self._gaps = gaps

    def _end_worker(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.end()

    def _drop_arrival(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.drop()


def localized(spec: SessionSpec, cache: NodeCache) -> SessionSpec:
    """The spec with every place that the cache holds replaced by the one in the cache."""
    statistics = None if spec.statistics is None else localized(spec.statistics, cache)
    return replace(
        spec,
        model=_model_here(spec.model, cache),
        calibration=_data_here(spec.calibration, cache),
        statistics=statistics,
    )


def _model_here(source: ModelSource, cache: NodeCache) -> ModelSource:
    entry = _held(source.digest, cache)
    return source if entry is None else replace(source, location=str(entry))


def _data_here(source: DataSource, cache: NodeCache) -> DataSource:
    entry = _held(source.digest, cache)
    return source if entry is None else replace(source, path=str(entry / DATA))


def _held(digest: str, cache: NodeCache) -> Path | None:
    return cache.path(digest) if cache.holds(digest) else None


def _here(given: Isolation, memory_bytes: int | None, shared_store: bool, closed: Sequence[str]) -> Isolation:
    """The runner's choice as it holds on this node, where these places are `closed` too.

    A node may be the runner's own machine, so what is closed there is closed here.
    """
    own = tuple(os.path.realpath(place) for place in closed if os.path.exists(place))
    return replace(
        given,
        memory_bytes=memory_bytes or memory_of_machine(),
        closed=(*given.closed, *own),
        writable=given.writable if shared_store else (),
        covered=_sockets_of_ray(),
    )


def _places_of_ray() -> tuple[str, ...]:
    """Where Ray keeps sockets, logs and the token on this node."""
    places = [str(Path.home() / ".ray"), os.environ.get("RAY_AUTH_TOKEN_PATH", "")]
    with suppress(Exception):  # not in a Ray process: a test
        import ray

        places.append(ray.get_runtime_context().get_temp_dir())
    return tuple(place for place in places if place)


def _sockets_of_ray() -> tuple[str, ...]:
    """Where this node's object store listens, with everybody's objects."""
    with suppress(Exception):  # not in a Ray process: a test
        import ray

        context = ray.get_runtime_context()
        sockets = Path(context.get_temp_dir()) / context.get_session_name() / "sockets"
        return (os.path.realpath(sockets),) if sockets.is_dir() else ()
    return ()


def _own_folder(parent: Path) -> Path:
    """A folder for the temporary files of this process, locked while it lives; folders that others left
    behind, who died, go.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        with suppress(OSError):
            descriptor = _lock_folder(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    own = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    _lock_folder(own)
    tempfile.tempdir = str(own)
    return own


def _folder_of_logs(folder: Path, days: float) -> Path:
    """The folder, without the logs that nobody has written to for so long."""
    folder.mkdir(parents=True, exist_ok=True)
    before = time.time() - days * 86400
    for log in folder.glob("worker-*.log"):
        with suppress(FileNotFoundError):
            if log.stat().st_mtime < before:
                log.unlink()
    return folder


def _lock_folder(folder: Path) -> int:
    """Hold the folder as long as the descriptor is open. Raises OSError where another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
