"""A service whose processes die by order of a seed while clients use it; then everything comes to rest.

One database, one API, two runners, several clients. Only the victim is started again. What the clients saw and what
is left go to the checker.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from service.client import Client
from service.db.engine import Database
from service.db.tables import WebhookRow
from service.errors import InsufficientStorage
from service.remote.handles import JobHandle
from service.remote.transport import ProblemError
from service.states import TERMINAL
from tests.chaos.checker import cell, numbers
from tests.chaos.final import Final, files_of, rows_of
from tests.chaos.history import History, witnessing
from tests.chaos.orders import ANYWHERE, Order, Orders
from tests.fork_server import ForkServer
from tests.processes import ROOT, Process, Service
from tests.service.receiver import Receiver

LEASE_SECONDS = 3.0
VARIABLES = {
    "BITPLAN_LEASE_SECONDS": str(LEASE_SECONDS),
    "BITPLAN_HEARTBEAT_SECONDS": "0.5",
    "BITPLAN_LOG_LEVEL": "info",
    "BITPLAN_WEBHOOK_NETWORKS": "127.0.0.1/32",
    "BITPLAN_RATE_LIMIT": "0",
    "BITPLAN_GC_INTERVAL_HOURS": "0",
    "BITPLAN_SESSION_FACTORY": "recorded_session:Recorded",
}
ROLES = ("api", "runner", "runner-2")
CLIENTS = 3
PRELOADED = (
    "uvicorn",
    "service.app",
    "service.cli.main",
    "service.runner.process",
    "service.runner.search_job",
    "service.runner.settling",
    "service.checkpoint_writer",
    "sensitivity.session",
    "sensitivity.model_check",
    "transformers.models.resnet.modeling_resnet",
)
SECRET = "whsec_" + "c2VjcmV0" * 4
JOB_SECONDS, REST_SECONDS = 600, 300
READY = {"api": b"Uvicorn running", "runner": b"runner.started"}
"""What the log of a role says when its process has begun to work."""


@dataclass(frozen=True)
class Shape:
    """What a job asks for."""

    name: str
    budgets: tuple[str, ...]
    metrics: tuple[str, ...]
    evaluations: int

    def options(self) -> dict[str, Any]:
        """The parameters of `Client.submit` beside model and calibration."""
        return {
            "budgets": self.budgets,
            "schemes": ("w2", "w3", "w4"),
            "metrics": self.metrics,
            "samples": 8,
            "batch_size": 4,
            "evaluations": self.evaluations,
        }


SHAPES = (
    Shape("plain", ("3 bpw",), ("output_kl",), 2),
    Shape("two budgets", ("3 bpw", "uniform w3"), ("output_kl",), 1),
    Shape("blocks", ("3 bpw",), ("output_kl", "fisher"), 2),
)


@dataclass(frozen=True)
class Kill:
    """A process that died of SIGKILL: when, on the clock of the history and on the wall."""

    role: str
    place: str
    at: float
    wall: float


class Chaotic(Service):
    """A service whose processes get their orders at birth; without orders it is calm."""

    def __init__(
        self, folder: Path, database_url: str, variables: Mapping[str, str], forks: ForkServer
    ) -> None:
        super().__init__(folder, database_url, {**VARIABLES, **variables}, roles=ROLES, launch=forks.launch)
        self.orders: Orders | None = None
        self.kills: list[Kill] = []
        self.stops = 0
        self.fault: BaseException | None = None
        self._lives: Counter[str] = Counter()
        self._order: dict[str, Order | None] = {}
        self._born: dict[str, float] = {}
        self._ready: dict[str, float | None] = {}
        self._written: dict[str, int] = {}
        self._paused: dict[str, float] = {}
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def environment_of(self, role: str) -> Mapping[str, str]:
        order = None if self.orders is None else self.orders.of(role, self._lives[role])
        self._lives[role] += 1
        self._order[role], self._born[role] = order, time.monotonic()
        self._ready[role], self._written[role] = None, self._log_bytes(role)
        if order is None:
            return self.environment
        once = self.folder / "once" / f"{role}-{self._lives[role]}"
        once.mkdir(parents=True)
        return {
            **self.environment,
            "BITPLAN_FAILPOINTS": order.entries,
            "BITPLAN_FAILPOINTS_ONCE": str(once),
        }

    def rest(self, role: str) -> float:
        order = self._order[role]
        return 0.0 if order is None else order.rest_seconds

    def died(self, role: str) -> None:
        order, code = self._order[role], self.process(role).poll()
        if code == -signal.SIGKILL:
            fired = self._fired(role)
            place = (
                order.place
                if order is not None and any(name.startswith(order.place) for name in fired)
                else ANYWHERE
            )
            self.kills.append(Kill(role, place, time.monotonic(), time.time()))

    def broken(self, error: BaseException) -> None:
        self.fault = error

    def supervise(self) -> Service:
        super().supervise()
        self._watcher.start()
        return self

    @property
    def worker_deaths(self) -> Counter[str]:
        """Failpoint -> how many workers were killed at it."""
        markers = (self.folder / "once").glob("*/worker.*")
        return Counter(".".join(marker.name.split(".")[:2]) for marker in markers)

    @property
    def deaths_by_order(self) -> int:
        return len(self.kills) + self.worker_deaths.total()

    def calm(self) -> None:
        """No more orders: whoever still has one is asked to leave, and its successor has none."""
        self.orders = None
        for role in self.roles:
            while self._order[role] is not None:
                self.process(role).send_signal(signal.SIGCONT)
                self.process(role).send_signal(signal.SIGTERM)
                time.sleep(0.2)

    def finish(self) -> dict[str, int]:
        """Ask every process to leave, once it works; their exit codes."""
        self._ending.set()
        for keeper in self._keepers:
            keeper.join()
        self._watcher.join()
        for role in self.roles:
            deadline = time.monotonic() + REST_SECONDS
            while self._ready_since(role) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            self.process(role).send_signal(signal.SIGTERM)
        return {role: self.process(role).wait(60) for role in self.roles}

    def _fired(self, role: str) -> list[str]:
        once = self.folder / "once" / f"{role}-{self._lives[role]}"
        return [marker.name for marker in once.iterdir()] if once.is_dir() else []

    def _watch(self) -> None:
        """Wake who has slept past the lease, and end who did not come to its failpoint."""
        while not self._ending.wait(0.05):
            for role in self.roles:
                order, process = self._order.get(role), self._processes[role]
                if order is not None and process.poll() is None:
                    self._attend(role, order, process)

    def _attend(self, role: str, order: Order, process: Process) -> None:
        now = time.monotonic()
        if is_stopped(process.pid):
            if now - self._paused.setdefault(role, now) > 1.5 * LEASE_SECONDS:
                self.stops += 1
                del self._paused[role]
                self._born[role] = now
                self._ready[role] = now
                process.send_signal(signal.SIGCONT)
            return
        woken = any(name.endswith(".stop") for name in self._fired(role))
        if order.place == ANYWHERE and not woken:
            if now - self._born[role] > order.life_seconds:
                self._end(role, order, process)
        elif (since := self._ready_since(role)) is not None and now - since > order.life_seconds:
            process.kill()

    def _end(self, role: str, order: Order, process: Process) -> None:
        if order.verb == "stop":
            (self.folder / "once" / f"{role}-{self._lives[role]}" / "anywhere.1.stop").touch()
            process.send_signal(signal.SIGSTOP)
        else:
            process.kill()

    def _ready_since(self, role: str) -> float | None:
        """When the process said that it works; a busy machine takes its time until then."""
        if self._ready[role] is None:
            with (self.folder / f"{role}.log").open("rb") as log:
                log.seek(self._written[role])
                if READY[role.partition("-")[0]] in log.read():
                    self._ready[role] = time.monotonic()
        return self._ready[role]

    def _log_bytes(self, role: str) -> int:
        log = self.folder / f"{role}.log"
        return log.stat().st_size if log.exists() else 0


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


class Visitor(threading.Thread):
    """A client: sends calibration data, submits a job, looks at it, cancels and resumes some."""

    def __init__(self, run: Run, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._run, self._chance = run, random.Random(f"{run.seed} {name}")
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with witnessing(self._run.service.url, self.name, self._run.history) as client:
                number = 0
                while not self._run.over.is_set():
                    self._try(client, f"{self.name}-{number}")
                    number += 1
        except BaseException as error:
            self.error = error
            self._run.over.set()

    def _try(self, client: Client, label: str) -> None:
        """Whoever is told that there is no room comes again later, with something else."""
        try:
            self._visit(client, label)
        except ProblemError as problem:
            if problem.status != InsufficientStorage.status:
                raise
            time.sleep(0.3)

    def _visit(self, client: Client, label: str) -> None:
        shape = self._chance.choice(SHAPES)
        data = make_calibration(
            self._run.folder / "sent" / f"{label}.safetensors", f"{self._run.seed} {label}"
        )
        calibration = client.upload_calibration(data)["id"]
        data.unlink()
        hook = {"url": self._run.receiver.url, "secret": SECRET} if self._chance.random() < 0.5 else None
        labels = {"request": label, "shape": shape.name}
        job = client.submit(self._run.model, calibration, labels=labels, webhook=hook, **shape.options())
        cancels = self._chance.random() < 0.15
        while not self._follow(client, job, cancel=cancels):
            job = JobHandle(client.transport, client.transport.post(f"/v1/jobs/{job.id}/resume"))
            cancels = False
        if self._run.checkpoints and self._chance.random() < 0.3:
            self._follow(client, job.plan("3 bpw").write_checkpoint("pytorch"), cancel=False)

    def _follow(self, client: Client, job: JobHandle, *, cancel: bool) -> bool:
        """Look until it has ended; False when it did not succeed."""
        deadline = time.monotonic() + JOB_SECONDS
        while not job.refresh(wait_seconds=self._chance.choice((0, 1))).finished:
            if self._run.service.fault is not None:
                raise self._run.service.fault
            assert time.monotonic() < deadline, f"{job.id} is {job.state}"
            self._look(client, job)
            if cancel and self._chance.random() < 0.2:
                ask_to_cancel(client, job.id)
            time.sleep(self._chance.uniform(0.02, 0.2))
        self._look(client, job, everything=True)
        return job.state == "succeeded"

    def _look(self, client: Client, job: JobHandle, *, everything: bool = False) -> None:
        path = f"/v1/jobs/{job.id}"
        if everything or self._chance.random() < 0.5:
            list(client.transport.pages(f"{path}/events", {"limit": self._chance.choice((5, 200))}))
        if (
            job.resource["score_set"]
            and job.resource["kind"] == "search"
            and (everything or self._chance.random() < 0.5)
        ):
            list(client.transport.pages(f"{path}/scores", {"limit": self._chance.choice((7, 200))}))
            list(client.transport.pages(f"{path}/plans"))
        if self._chance.random() < 0.1:
            client.transport.get("/v1/jobs", {"limit": 20})


def ask_to_cancel(client: Client, ident: str) -> None:
    try:
        client.transport.send("POST", f"/v1/jobs/{ident}/cancel")
    except ProblemError as problem:
        if problem.slug != "job-finished":
            raise


def make_calibration(path: Path, seed: str) -> Path:
    """Labeled images that no other seed has."""
    path.parent.mkdir(exist_ok=True)
    chance = np.random.default_rng(list(seed.encode()))
    images = chance.standard_normal((20, 1, 16, 16), dtype=np.float32)
    save_file({"pixel_values": images, "labels": chance.integers(0, 5, 20)}, path)
    return path


@dataclass(frozen=True)
class Undisturbed:
    """What every shape gives when nobody dies."""

    model: Path
    scores: Mapping[str, Sequence[Any]]
    plans: Mapping[str, Mapping[str, Any]]
    """Shape -> budget -> the layers of its plan."""


Trouble = Callable[["Run"], None]


def deaths(orders: Orders, kills: int) -> Trouble:
    """Kill by order until so many processes have died."""

    def trouble(run: Run) -> None:
        run.service.orders = orders
        for role in ROLES:
            run.service.process(role).kill()
        while run.service.deaths_by_order < kills and not run.over.wait(0.1):
            pass

    return trouble


@dataclass
class Run:
    """`go`: clients use the service while `trouble` lasts, then everything comes to rest, then the end is read."""

    service: Chaotic
    forks: ForkServer
    undisturbed: Undisturbed
    receiver: Receiver
    trouble: Trouble
    seed: int = 1
    checkpoints: bool = False
    history: History = field(default_factory=History)
    over: threading.Event = field(default_factory=threading.Event)
    model: str = ""
    again: list[tuple[str, Any, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        return self.service.folder

    def go(self) -> Final:
        self.service.start().supervise()
        with witnessing(self.service.url, "first", self.history) as client:
            self.model = client.upload_model(self.undisturbed.model)["id"]
            self._wait_for_model(client)
        visitors = [Visitor(self, f"client{number}") for number in range(CLIENTS)]
        began = time.monotonic()
        for visitor in visitors:
            visitor.start()
        try:
            self.trouble(self)
        finally:
            self.over.set()
        self.service.calm()
        for visitor in visitors:
            visitor.join()
        self.seconds = time.monotonic() - began
        for visitor in visitors:
            if visitor.error is not None:
                raise visitor.error
        return self._rest()

    def _wait_for_model(self, client: Client) -> None:
        deadline = time.monotonic() + JOB_SECONDS
        while (state := client.model(self.model)["state"]) == "verifying":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert state == "ready", client.model(self.model)

    def _rest(self) -> Final:
        """Let everything end, solve some again, ask every process to leave, and look."""
        with self.service.database() as database:
            self._settle(database)
            with witnessing(self.service.url, "last", self.history) as client:
                self._solve_again(client, database)
            self._settle(database)
            codes = self.service.finish()
            assert codes["runner"] == codes["runner-2"] == 0, codes
            strays = self._strays()
            rows = rows_of(database)
        self.again += self._compare(rows)
        told = [json.loads(one.body) for one in self.receiver.received]
        final = Final(
            **rows,
            files=files_of(self.folder / "data"),
            again=self.again,
            expected=self.undisturbed.scores,
            told=[[one["data"]["id"], one["type"]] for one in told],
            strays=strays,
        )
        self.history.save(self.folder / "history.jsonl")
        final.save(self.folder / "final.json")
        return final

    def _settle(self, database: Database) -> None:
        """Wait for every job and delivery. What a dead process was sending would be due in two minutes: now."""
        deadline = time.monotonic() + REST_SECONDS
        while time.monotonic() < deadline:
            with database.write() as session:
                for hook in session.query(WebhookRow).filter(WebhookRow.state == "pending"):
                    hook.next_attempt_at = 0.0
            rows = rows_of(database)
            unsettled = [hook for hook in rows["webhooks"] if hook["state"] in ("waiting", "pending")]
            if all(job["state"] in TERMINAL for job in rows["jobs"]) and not unsettled:
                return
            time.sleep(0.5)

    def _solve_again(self, client: Client, database: Database) -> None:
        """The same request once more for one job of each shape: the same plans, and nothing is measured."""
        before = rows_of(database)
        succeeded = {
            job["request"]["labels"]["shape"]: job
            for job in before["jobs"]
            if job["kind"] == "search" and job["state"] == "succeeded"
        }
        for shape in SHAPES:
            if shape.name not in succeeded:
                continue
            old = succeeded[shape.name]
            asked = {"labels": {"request": f"again-{shape.name}", "shape": shape.name}, **shape.options()}
            new = client.submit(old["request"]["model"], old["request"]["calibration"], **asked)
            new.wait(timeout=JOB_SECONDS)
            for plan in client.job(old["id"]).plans():
                twin = new.plan(plan.resource["budget"])
                self.again.append((plan.id, plan.document, twin.document))
        measured = [unit["key"] for unit in rows_of(database)["units"]]
        self.again.append(("units", sorted(unit["key"] for unit in before["units"]), sorted(measured)))

    def _compare(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, Any, Any]]:
        """Every plan beside that of the undisturbed run."""
        shapes = {
            job["id"]: job["request"]["labels"]["shape"] for job in rows["jobs"] if job["kind"] == "search"
        }
        return [
            (
                plan["id"],
                plan["document"]["layers"],
                self.undisturbed.plans[shapes[plan["job_id"]]][plan["budget"]],
            )
            for plan in rows["plans"]
        ]

    def _strays(self) -> list[str]:
        deadline = time.monotonic() + 10
        while (found := self.forks.strays()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [command_of(pid) for pid in found]

    def recovery_seconds(self) -> dict[str, float]:
        """Role -> the median time from a death to its end: the next answer, the next claim of the same job."""
        answered = sorted(one.at for one in self.history.seen if one.status is not None)
        found: dict[str, list[float]] = {"api": [], "runner": []}
        claims = {role: claims_of(self.service, role) for role in ROLES if role != "api"}
        for kill in self.service.kills:
            if kill.role == "api":
                found["api"] += [at - kill.at for at in answered if at > kill.at][:1]
                continue
            held = [job for at, job, until in claims[kill.role] if at < kill.wall <= until][-1:]
            later = sorted(
                at for lives in claims.values() for at, job, _ in lives if [job] == held and at > kill.wall
            )
            found["runner"] += [at - kill.wall for at in later[:1]]
        return {role: statistics.median(times) for role, times in found.items() if times}

    def summary(self, found: Mapping[str, Sequence[str]], final: Final) -> dict[str, Any]:
        """The numbers of docs/reliability.md."""
        places = Counter(kill.place for kill in self.service.kills) + self.service.worker_deaths
        seen = {
            (one.path, *cell(item))
            for one in self.history.seen
            if one.accepted and one.path.endswith("/scores")
            for item in one.got["items"]
        }
        return {
            "seed": self.seed,
            "kills": self.service.deaths_by_order,
            "stops": self.service.stops,
            "by_role": dict(Counter(kill.role.partition("-")[0] for kill in self.service.kills)),
            "places": dict(sorted(places.items())),
            "jobs": len(final.jobs),
            "states": dict(Counter(job["state"] for job in final.jobs)),
            "requests": len(self.history.seen),
            "unanswered": sum(one.status is None for one in self.history.seen),
            "scores_seen": len(seen),
            "lost": len(found.get("lost scores", ())) + len(found.get("scores that vanish", ())),
            "duplicates": len(found.get("duplicates", ())) + len(found.get("requests done twice", ())),
            "wrong_ends": len(found.get("ends", ()))
            + len(found.get("terminal events", ()))
            + len(found.get("moves", ())),
            "violations": sum(map(len, found.values())),
            "recovery_seconds": {role: round(value, 3) for role, value in self.recovery_seconds().items()},
            "seconds": round(self.seconds, 1),
        }


def claims_of(service: Service, role: str) -> list[tuple[float, str, float]]:
    """(claimed at, job, held until) by the log of a role; until infinity for what the process died with."""
    found: list[tuple[float, str, float]] = []
    for line in service.log(role).splitlines():
        if not line.startswith("{"):
            continue
        said = json.loads(line)
        at = datetime.fromisoformat(said["timestamp"]).timestamp()
        if said["event"] in ("job.finished", "job.released", "job.lease_lost") and found:
            found[-1] = (*found[-1][:2], at)
        elif said["event"] == "job.claimed":
            if found and found[-1][2] == float("inf"):
                found[-1] = (*found[-1][:2], at)
            found.append((at, said["job"], float("inf")))
    return found


def command_of(pid: int) -> str:
    try:
        return f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode()}"
    except OSError:
        return str(pid)


def fork_server(recording: Path, variables: Mapping[str, str] | None = None) -> ForkServer:
    """Forks of one process that has imported the service and torch, and finds recorded_session in `recording`."""
    recording.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("recorded_session.py"), recording)
    path = os.pathsep.join((str(ROOT), str(recording)))
    return ForkServer(PRELOADED, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(variables or {})})


def undisturbed_run(recording: Path, folder: Path, model: Path, forks: ForkServer) -> Undisturbed:
    """Run every shape once with the real session, whose answers are recorded, while nobody dies."""
    variables = {
        **VARIABLES,
        "BITPLAN_EXECUTOR": "in_process",
        "BITPLAN_SESSION_FACTORY": "recorded_session:Recording",
    }
    service = Service(folder, f"sqlite:///{folder / 'bitplan.db'}", variables, launch=forks.launch)
    try:
        with service.start().client() as client:
            data = make_calibration(folder / "sent" / "undisturbed.safetensors", "undisturbed")
            jobs = {
                shape.name: client.submit(model, data, **shape.options()).wait(timeout=JOB_SECONDS)
                for shape in SHAPES
            }
            plans = {
                name: {plan.resource["budget"]: plan.document["layers"] for plan in job.plans()}  # type: ignore[index]
                for name, job in jobs.items()
            }
        with service.database() as database:
            rows = rows_of(database)["scores"]
    finally:
        service.stop()
    return Undisturbed(model, {"|".join(cell(row)): numbers(row) for row in rows}, plans)
