"""Keeps one actor of a Ray cluster at work: places it, brings model and data to its node, runs units."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from quant.digest import FolderError, model_files
from sensitivity.spec import SessionSpec
from sensitivity.units import Unit, UnitResult
from service.executors.confine import Isolation
from service.executors.messages import failure_of, pack_unit, unpack, unpack_result
from service.executors.node_cache import DATA, Coming, Kind, NotWhatWasAsked, send
from service.executors.protocol import Failure
from service.executors.ray_scorer import Scorer, versions
from service.executors.ray_settings import RaySettings
from service.store.blobs import is_digest

PIECE_BYTES = 4 * 2**20
PIECES_UNDERWAY = 2
POLL_SECONDS = 0.5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
WAITING_SECONDS = 30.0
END_SECONDS = 5.0
KILLED = Failure("worker_crash", "The worker must survive the unit. Got its end by the runner.")


class Killed(Exception):  # noqa: N818 - says what happened
    """Somebody has ended this keeper's actor on purpose."""


class Unusable(Exception):  # noqa: N818 - says what happened
    """The node answers, but no unit may run there as it is."""


class Refused(Exception):  # noqa: N818 - says what happened
    """A unit cannot run on this node: `failure` says why."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True)
class Source:
    """Files that a node must have: those of a model's folder, or the one of a calibration set."""

    kind: Kind
    place: Path
    digest: str

    def files(self) -> list[tuple[str, Path]]:
        """Names on the node, and places here. Raises FolderError."""
        if self.kind == "data":
            return [(DATA, self.place)]
        return [(name, self.place / name) for name in model_files(self.place)]


@dataclass(frozen=True)
class Telling:
    """Whom a keeper tells: what a worker is not kept from, what a person should know, what is wrong."""

    gaps: Callable[[tuple[str, ...]], None] = lambda gaps: None
    log: Callable[[str, dict[str, Any]], None] = lambda event, facts: None
    unusable: Callable[[str], None] = lambda why: None


@dataclass(frozen=True)
class Wanted:
    """What every slot of one executor runs."""

    spec: SessionSpec
    factory: str
    isolation: Isolation
    ray: RaySettings
    telling: Telling = field(default_factory=Telling)

    def sources(self) -> list[Source]:
        """What is to be fetched by digest; anything else stays the place that the spec names."""
        return [] if self.ray.shared_store else sources_of(self.spec)

    def resources(self) -> dict[str, float]:
        """What one worker takes of its node."""
        gpus = self.ray.gpus_per_worker if self.spec.device.startswith("cuda") else 0
        return {"num_cpus": self.spec.threads, "num_gpus": gpus}


class RayKeeper:
    """See `pool.Keeper`. Ray restarts an actor that dies, on another node if need be, and never repeats a
    call: the unit that was lost comes back as `worker_crash`.
    """

    pid = None
    leaving_seconds = 2.0

    def __init__(self, wanted: Wanted, slot: int):
        self._wanted, self._slot = wanted, slot
        self._actor: Any = None
        self._open = False
        self._broken: Failure | None = None
        self._killed = threading.Event()

    def prepare(self) -> None:
        """See `pool.Keeper`."""
        if self._broken is not None:
            return
        try:
            self._prepare()
        except (Killed, Refused):
            return
        except Exception:  # the next unit will meet it again, and report it
            self._open = False
            self._killed.wait(FIRST_PAUSE_SECONDS)

    def attempt(self, unit: Unit, began: Callable[[], None]) -> UnitResult | Failure | None:
        """See `pool.Keeper`."""
        try:
            return self._run(unit, began)
        except Refused as refused:
            failure = refused.failure
        except Killed:
            failure = KILLED
        except RayError as error:
            self._open = False
            failure = _lost(error)
        except Exception as error:
            failure = KILLED if self._killed.is_set() else failure_of(error, "unit_error")
        return failure

    def _run(self, unit: Unit, began: Callable[[], None]) -> UnitResult | Failure | None:
        """None when the actor was lost while it had nothing to do: then `prepare` waits for the next."""
        if self._broken is None:
            self._prepare()
        if self._broken is not None:
            return self._broken
        if not self._lives():
            return None
        began()
        said, head, arrays, gaps = self._call("run", *pack_unit(unit))
        self._wanted.telling.gaps(tuple(gaps))
        if said == "closed":
            self._open = False
            return None
        return unpack_result(head, arrays) if said == "result" else self._failed(head)

    def _lives(self) -> bool:
        """Whether the actor still has its session: one that Ray has restarted has none."""
        try:
            self._open = self._call("about")["open"]
        except RayError:
            self._open = False
        return self._open

    def kill(self) -> None:
        """See `pool.Keeper`."""
        self._killed.set()
        self._kill_actor()

    def end(self) -> None:
        """See `pool.Keeper`; the worker has a moment to leave by itself."""
        actor = self._actor
        if actor is not None and not self._killed.is_set():
            ray.wait([actor.end.remote()], timeout=END_SECONDS)
        self._kill_actor()

    def _failed(self, head: bytes) -> Failure:
        failure = Failure(**unpack(head))
        if failure.kind in ("bad_input", "not_isolated"):
            self._broken = failure
        return failure

    def _prepare(self) -> None:
        """Have an actor with an open session; backs off while Ray places or restarts it, and while the nodes
        are not as they must be.
        """
        pause = FIRST_PAUSE_SECONDS
        while not self._open:
            if self._killed.is_set():
                raise Killed
            try:
                self._settle()
                return
            except ActorUnavailableError:
                pass
            except ActorDiedError as error:
                if error.actor_init_failed:
                    self._wanted.telling.unusable(f"A scorer must start on its node. Got: {error}")
                self._kill_actor()
            except Unusable as why:
                self._wanted.telling.unusable(str(why))
                self._kill_actor()
            self._killed.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _settle(self) -> None:
        if self._actor is None:
            self._actor = self._new_actor()
        about = self._call("about", waiting="ray.waiting_for_a_slot")
        theirs, ours = about["versions"], versions()
        if theirs != ours:
            raise Unusable(
                f"Nodes must have the runner's versions, {_listed(ours)}. Got {_listed(theirs)} on"
                f" {about['host']}. Install the same Bitplan there."
            )
        for source in self._wanted.sources():
            self._bring(source, about["host"])
        spec = json.dumps(self._spec().as_json())
        self._wanted.telling.gaps(tuple(self._call("open", spec)))
        self._open = True

    def _spec(self) -> SessionSpec:
        """On its node a worker sees only the devices that Ray gave it."""
        spec = self._wanted.spec
        return replace(spec, device="cuda") if spec.device.startswith("cuda") else spec

    def _new_actor(self) -> Any:
        wanted = self._wanted
        options = {"max_restarts": -1, "max_task_retries": 0, **wanted.resources()}
        memory, shared = wanted.ray.memory_bytes, wanted.ray.shared_store
        made = ray.remote(Scorer).options(**options)
        return made.remote(wanted.factory, wanted.isolation.as_json(), memory, shared)

    def _bring(self, source: Source, host: str) -> None:
        """Have the files on the actor's node. Raises `Refused`."""
        while (claimed := self._call("claim", source.digest)) == "busy":
            if self._killed.wait(POLL_SECONDS):
                raise Killed
        if claimed == "here":
            return
        began = time.monotonic()
        try:
            files = source.files()
            sizes = [Coming(name, path.stat().st_size) for name, path in files]
            full = self._call("expect", [(coming.name, coming.size) for coming in sizes])
            if full:
                raise Refused(Failure("worker_crash", full, {"error": "cache_full", "node": host}))
            self._send(files, sizes)
            wrong = self._call("finish", source.kind)
        except RayError:  # may be an OSError of the node's too, which says nothing of our files
            raise
        except (OSError, FolderError, NotWhatWasAsked) as error:
            wrong = str(error)
        if wrong:
            self._broken = Failure("bad_input", wrong, {"error": f"{source.kind}_changed"})
            raise Refused(self._broken)
        total = sum(coming.size for coming in sizes)
        facts = {"node": host, "bytes": total, "seconds": round(time.monotonic() - began, 1)}
        self._wanted.telling.log("ray.sent", {"what": source.kind, "digest": source.digest, **facts})

    def _send(self, files: list[tuple[str, Path]], sizes: list[Coming]) -> None:
        """Piece by piece, a few on their way at a time."""
        underway: list[Any] = []

        def receive(piece: bytes) -> None:
            while len(underway) >= PIECES_UNDERWAY:
                self._result(underway.pop(0))
            underway.append(self._actor.receive.remote(piece))

        send(files, sizes, receive, PIECE_BYTES)
        for reference in underway:
            self._result(reference)

    def _call(self, method: str, *arguments: Any, waiting: str = "") -> Any:
        return self._result(getattr(self._actor, method).remote(*arguments), waiting)

    def _result(self, reference: Any, waiting: str = "") -> Any:
        """What a call gives; `waiting` is logged while it takes long. Raises `Killed` and RayError."""
        told = time.monotonic()
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            if self._killed.is_set():
                raise Killed
            if waiting and time.monotonic() - told > WAITING_SECONDS:
                told = time.monotonic()
                self._tell_waiting(waiting)
        return ray.get(reference)

    def _tell_waiting(self, event: str) -> None:
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        self._wanted.telling.log(event, {"slot": self._slot, "wants": self._wanted.resources(), "free": free})

    def _kill_actor(self) -> None:
        actor, self._actor, self._open = self._actor, None, False
        if actor is not None:
            ray.kill(actor, no_restart=True)


def sources_of(spec: SessionSpec) -> list[Source]:
    """The model and the data of a spec, and of where its statistics come from, that have a digest."""
    found = []
    model, data = spec.model, spec.calibration
    if model.kind == "folder" and is_digest(model.digest) and Path(model.location).is_dir():
        found.append(Source("model", Path(model.location), model.digest))
    if data.path and is_digest(data.digest) and Path(data.path).is_file():
        found.append(Source("data", Path(data.path), data.digest))
    more = [] if spec.statistics is None else sources_of(spec.statistics)
    return list(dict.fromkeys([*found, *more]))


def _lost(error: RayError) -> Failure:
    """The actor or its node is gone, and the unit with it."""
    first = next(iter(str(error).splitlines()), "")
    detail = {"error": type(error).__name__, "log_tail": str(error)[-2000:]}
    return Failure(
        "worker_crash", f"The worker's node must stay. Got {type(error).__name__}: {first}", detail
    )


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
