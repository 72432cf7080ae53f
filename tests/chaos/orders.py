"""Who dies when, drawn from a seed: the same seed gives the same orders to every process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from service.failpoints import FAILPOINTS

Verb = Literal["kill", "stop"]
LONGEST_PASS: Mapping[str, int] = {
    "api.blob_written": 2,
    "api.before_commit": 4,
    "api.after_commit": 4,
    "runner.after_claim": 3,
    "runner.before_store": 10,
    "runner.artifact_written": 10,
    "runner.after_store": 10,
    "runner.scoring": 10,
    "runner.choosing": 4,
    "runner.reporting": 4,
    "runner.writing_plan": 3,
    "runner.checkpoint_stored": 1,
    "runner.before_finish": 3,
    "webhook.before_send": 2,
    "webhook.after_send": 2,
    "worker.before_unit": 8,
    "worker.after_unit": 8,
}
"""Failpoint -> the last pass that an order may name: what a process gets to within seconds."""
ELSEWHERE = frozenset({"runner.hub_announced", "runner.hub_fetching", "runner.hub_arrived"})
"""Failpoints that no job of the matrix passes: its models are uploaded."""
ANYWHERE = "anywhere"
SHARE_ANYWHERE, SHARE_STOPPED = 0.15, 0.08
LONGEST_LIFE_SECONDS = 5.0
"""A process that did not come to its failpoint so long after it was ready dies where it is, unless a run says
otherwise."""
LONGEST_REST_SECONDS = 0.5


@dataclass(frozen=True)
class Order:
    """What happens to one process of a role.

    place    a failpoint, or "anywhere": by a signal from outside `life_seconds` after its birth, ready or not
    nth      at which pass
    verb     "kill", or "stop": SIGSTOP, and SIGCONT when the lease is over
    worker   what happens to the workers of a runner beside that: failpoint entries
    """

    place: str
    nth: int
    verb: Verb
    life_seconds: float
    rest_seconds: float
    worker: tuple[str, ...] = ()

    @property
    def entries(self) -> str:
        """The value of BITPLAN_FAILPOINTS."""
        own = () if self.place == ANYWHERE else (f"{self.place}:{self.nth}={self.verb}",)
        return ",".join((*own, *self.worker))


@dataclass(frozen=True)
class Orders:
    """The orders of a seed: `of(role, n)` is that of the role's nth process.

    Only processes that have workers (`workers`) are told what happens to them. `without` are failpoints that a
    run's jobs do not pass, `longest_life` the seconds that a process may take to come to its own.
    """

    seed: int
    workers: bool = False
    without: frozenset[str] = frozenset()
    longest_life: float = LONGEST_LIFE_SECONDS

    def of(self, role: str, n: int) -> Order:
        chance = random.Random(f"{self.seed} {role} {n}")
        place = self._place(role, n, chance)
        verb: Verb = "stop" if chance.random() < SHARE_STOPPED else "kill"
        return Order(
            place,
            1 if place == ANYWHERE else chance.randint(1, LONGEST_PASS[place]),
            verb,
            chance.uniform(0.05, LONGEST_LIFE_SECONDS) if place == ANYWHERE else self.longest_life,
            chance.choice((0.0, 0.0, chance.uniform(0, LONGEST_REST_SECONDS))),
            self._worker_entries(role, chance),
        )

    def places(self, role: str) -> list[str]:
        """The failpoints that processes of this role pass themselves."""
        kinds = ("api",) if role == "api" else ("runner", "webhook")
        left_out = self.without | ELSEWHERE
        return [name for name in FAILPOINTS if name.partition(".")[0] in kinds and name not in left_out]

    def _place(self, role: str, n: int, chance: random.Random) -> str:
        """Each failpoint once in every round, in an order of the round's own."""
        if chance.random() < SHARE_ANYWHERE:
            return ANYWHERE
        places = self.places(role)
        round_, position = divmod(n, len(places))
        random.Random(f"{self.seed} {role} round {round_}").shuffle(places)
        return places[position]

    def _worker_entries(self, role: str, chance: random.Random) -> tuple[str, ...]:
        if not self.workers or role == "api":
            return ()
        places = [name for name in FAILPOINTS if name.startswith("worker.")]
        chosen = {
            (name, chance.randint(1, LONGEST_PASS[name]))
            for name in chance.choices(places, k=chance.randint(0, 2))
        }
        return tuple(f"{name}:{nth}=kill" for name, nth in sorted(chosen))
