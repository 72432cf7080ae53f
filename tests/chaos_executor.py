"""A seeded executor that misbehaves around any other one: dies, hangs, duplicates, reorders, answers wrongly, is slow."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sensitivity.spec import SessionSpec
from sensitivity.units import ScoreUnit, Unit, UnitResult
from service.executors.protocol import Executor, Failure, Outcome

SPOILED = ("die_before", "die_after", "hang", "wrong_payload")
HARMLESS = ("fine", "slow", "duplicate")
WEIGHTS: Mapping[str, float] = {
    "fine": 4,
    "slow": 1,
    "duplicate": 1,
    "die_before": 1,
    "die_after": 1,
    "hang": 1,
    "wrong_payload": 1,
}
"""How often what happens to an attempt, in proportion."""
MOST_SPOILED = 2
"""Attempts of a unit that come to nothing; the runner gives up at the third."""
LONGEST_WAITS = 6


@dataclass
class _Held:
    """An outcome that is given after so many more calls of `wait`."""

    outcome: Outcome
    waits: int


class Chaos:
    """Runs units in `inner`. What happens to an attempt of a unit follows from the seed, the key and the number of the
    attempt, so equal seeds do equal harm however the work is spread.

    die_before      the unit never ran; a crash is told
    die_after       it ran, and its result is lost; a crash is told
    hang            a crash is told while it still runs, and what it came to is told later, once more
    wrong_payload   another layer's scores, or none, as if worker and runner had lost step
    duplicate       the outcome comes twice
    slow            the outcome comes late

    and all that comes at once comes in any order.
    """

    name = "chaos"

    def __init__(self, inner: Executor, seed: int, weights: Mapping[str, float] = WEIGHTS):
        self._inner, self._seed, self._weights = inner, seed, weights
        self.capacity = max(4, inner.capacity)
        self._order = random.Random(seed)
        self._tries: Counter[str] = Counter()
        self._spoiled: Counter[str] = Counter()
        self._running: dict[str, tuple[str, Unit, str]] = {}
        self._held: list[_Held] = []
        self.happened: Counter[str] = Counter()

    def start(self, spec: SessionSpec) -> None:
        self._inner.start(spec)

    def submit(self, key: str, unit: Unit) -> None:
        self._tries[key] += 1
        attempt = f"{self._seed}:{key}:{self._tries[key]}"
        draw = random.Random(attempt)
        kinds = HARMLESS if self._spoiled[key] >= MOST_SPOILED else tuple(self._weights)
        what = draw.choices(kinds, [self._weights[kind] for kind in kinds])[0]
        self.happened[what] += 1
        self._spoiled[key] += what in SPOILED
        if what in ("die_before", "hang"):
            self._hold(Outcome(key, failure=_crash(what)), draw)
        if what != "die_before":
            self._running[attempt] = (key, unit, what)
            self._inner.submit(attempt, unit)

    def wait(self, timeout: float) -> list[Outcome]:
        for outcome in self._inner.wait(timeout if not self._held else min(timeout, 0.01)):
            self._take(outcome)
        for held in self._held:
            held.waits -= 1
        idle = not self._running
        due = [idle or held.waits <= 0 for held in self._held]
        outcomes = [held.outcome for held, now in zip(self._held, due, strict=True) if now]
        self._held = [held for held, now in zip(self._held, due, strict=True) if not now]
        self._order.shuffle(outcomes)
        return outcomes

    def close(self, grace_seconds: float = 10.0) -> None:
        self._inner.close(grace_seconds)
        for outcome in self._inner.wait(0):
            self._take(outcome)
        self._running.clear()

    def _take(self, outcome: Outcome) -> None:
        key, unit, what = self._running.pop(outcome.key)
        told = replace(outcome, key=key)
        draw = random.Random(f"{outcome.key}:{what}")
        if what == "die_after":
            told = Outcome(key, failure=_crash(what))
        elif what == "wrong_payload" and told.result is not None:
            told = Outcome(key, result=_wrong(unit, told.result, draw))
        if what in ("fine", "die_after", "wrong_payload"):
            self._held.append(_Held(told, 0))
        else:
            self._hold(told, draw)
        if what == "duplicate":
            self._hold(told, draw)

    def _hold(self, outcome: Outcome, draw: random.Random) -> None:
        self._held.append(_Held(outcome, draw.randint(1, LONGEST_WAITS)))


def _crash(how: str) -> Failure:
    return Failure("worker_crash", f"The worker must survive the unit. Got chaos: {how}.", {"error": "Chaos"})


def _wrong(unit: Unit, result: UnitResult, draw: random.Random) -> UnitResult:
    """What no unit may be answered with."""
    if isinstance(unit, ScoreUnit) and draw.random() < 0.5:
        return replace(
            result, scores=tuple(replace(row, layer=f"{row.layer}.other") for row in result.scores)
        )
    return UnitResult(facts={"forwards": 0})
