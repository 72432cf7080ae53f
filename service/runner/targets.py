"""The fewest bytes that keep a quality: bisection over the frontier with plans that are measured.

At every size of the frontier that is tried the program's plan is measured on the choosing part; where it
misses the target by little, it is refined as plans of a budget are. The smallest size that does is refined
too, and its plan is confirmed on the reporting part, which neither scored nor chose. Every measurement is
stored as it comes, so a job that died goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quant.plan import Plan
from search.budget import parse_limits
from search.compile import Assignment
from search.frontier import FrontierPoint, frontier
from search.problem import Solution, Status
from search.solve import solve
from search.target import DIVERGENCE, Reading, Target, fewest
from sensitivity.catalog import TASKS
from service.db.repositories import plans
from service.errors import Unprocessable
from service.planning.ask import Ask
from service.planning.question import compile_limits
from service.planning.result import additive
from service.runner.context import JobContext
from service.runner.lab import Lab, Part, Quality
from service.runner.solving import Evidence, Solved, proven, settings_of, solved, store
from service.states import Stage

if TYPE_CHECKING:
    from service.runner.search_job import Search

POINTS = 200
"""Sizes of the frontier that may be tried; each try halves them."""
NEAR = 2.0
"""A plan that loses at most so many times what it may is refined: a little more quality may do."""


@dataclass(frozen=True, eq=False)
class Tried:
    """One size that was tried: what was measured of its plan, and whether that met the target."""

    point: FrontierPoint
    source: str
    assignment: Assignment
    reading: Reading
    solved: Solved | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "bytes": _bytes(self.point),
            "source": self.source,
            "measured": reading_json(self.reading),
            "met": self.reading.met,
        }


def check_targets(targets: Sequence[Target], inspection: Mapping[str, Any]) -> None:
    """Raise Unprocessable for a target on a quality that the task does not measure."""
    task = inspection["task"]
    known = {DIVERGENCE, *TASKS[task].quality} if task in TASKS else {DIVERGENCE}
    if task == "image_classification" and not inspection.get("has_labels", True):
        known -= {"accuracy"}
    if "user_metric" in inspection["available_metrics"]:
        known.add("user_metric")
    for target in targets:
        if target.name not in known:
            raise Unprocessable(
                "target-not-offered",
                f"A target must be on what the task {task} measures on these data: "
                f"{', '.join(sorted(known))}. Got {target.text!r:.80}. Pick another quality.",
                pointer="/targets",
            )


def plan_target(context: JobContext, lab: Lab, search: Search, ask: Ask, target: Target) -> str:
    """Find, prove and store the smallest plan that meets the target; its status."""
    settings = settings_of(search, ask, "target")
    with context.database.read() as session:
        known = plans.find(session, context.job.id, target.text, settings)
    if known is not None:
        return known.status
    return _Bisection(context, lab, search, ask, target).run(settings)


class _Bisection:
    def __init__(self, context: JobContext, lab: Lab, search: Search, ask: Ask, target: Target) -> None:
        self._context, self._lab, self._search = context, lab, search
        self._ask, self._target = ask, target
        self._compiled = compile_limits(search.inputs, ask, parse_limits(ask.limits))
        self._points = frontier(self._compiled, "bytes", most=POINTS)
        self._steps: list[Tried] = []
        self._full: dict[Part, NDArray[np.float64]] = {}

    def run(self, settings: str) -> str:
        """Bisect, confirm and store; the plan's status."""
        position = fewest(len(self._points), self._met)
        if position is None:
            return self._store(Solved(self._ask, self._compiled, self._refused(), None), settings)
        best = self._smallest(position)
        assert best.solved is not None
        plan, evidence = proven(self._lab, self._search, best.solved, best.assignment, best.source)
        return self._store(best.solved, settings, plan, evidence, best)

    def _met(self, position: int) -> bool:
        """Whether some plan of this size meets the target: the program's own or, if it nearly does, the
        refined one.
        """
        point = self._points[position]
        plan = self._compiled.assignment(point.choice)
        tried = Tried(point, additive(self._compiled.metric), plan, self._read(plan, "choosing"))
        self._steps.append(tried)
        if tried.reading.met or not tried.reading.excess <= NEAR:
            return tried.reading.met
        return self._refined(point).reading.met

    def _refined(self, point: FrontierPoint) -> Tried:
        ask = replace(self._ask, budget=f"bytes<={_bytes(point)}")
        found = solved(self._context, self._lab, self._search, ask)
        assert found.refined is not None, "the frontier's own plan fits"
        plan, source = found.refined.assignment, found.refined.source
        tried = Tried(point, source, plan, self._read(plan, "choosing"), found)
        self._steps.append(tried)
        return tried

    def _smallest(self, position: int) -> Tried:
        """The plan of the smallest size: the refined one if that meets the target, else the program's."""
        point = self._points[position]
        own = [step for step in self._steps if step.point is point]
        refined = next((step for step in own if step.solved is not None), None) or self._refined(point)
        plain = own[0]
        return refined if refined.reading.met else replace(plain, solved=refined.solved)

    def _read(self, plan: Assignment, part: Part) -> Reading:
        stage = Stage.SOLVING if part == "choosing" else Stage.MEASURING
        if part not in self._full:
            [full] = self._lab.quality([{}], part, stage)
            self._full[part] = _values(full, self._target.name)
        [found] = self._lab.quality([plan], part, stage)
        return self._target.judge(_values(found, self._target.name), self._full[part])

    def _refused(self) -> Solution:
        """Why there is no plan: nothing keeps the limits, which the program proves, or nothing keeps the
        quality, of which the program knows nothing.
        """
        if not self._points:
            return solve(self._compiled.problem, gap=self._ask.gap, time_limit=self._ask.time_limit_seconds)
        best = min(self._steps, key=lambda step: step.reading.excess)
        reason = (
            f"no plan of the menu meets {self._target.text!r}: the largest one, of {_bytes(best.point):,}"
            f" bytes, measures {best.reading.interval.mean:.4g}"
            f"{_unit(self._target)}; add schemes of more bits, or relax the target or the limits"
        )
        return Solution(Status.UNKNOWN, reason=reason)

    def _store(
        self,
        found: Solved,
        settings: str,
        plan: Plan | None = None,
        evidence: Evidence | None = None,
        best: Tried | None = None,
    ) -> str:
        confirmed = None if best is None else self._read(best.assignment, "reporting")
        told = {
            "text": self._target.text,
            "quality": self._target.name,
            "relation": self._target.relation,
            "value": self._target.value,
            "unit": self._target.unit,
            "choosing": None if best is None else reading_json(best.reading),
            "reporting": None if confirmed is None else reading_json(confirmed),
            "confirmed": None if confirmed is None else _word(confirmed),
            "steps": [step.as_json() for step in self._steps],
        }
        return store(
            self._context,
            self._search,
            found,
            self._target.text,
            settings,
            plan,
            evidence,
            status=str(Status.INFEASIBLE if plan is None else found.solution.status),
            more={"target": told},
        )


def reading_json(reading: Reading) -> dict[str, Any]:
    """Mean, standard error, interval, number of samples."""
    return {**reading.interval.as_json(), "samples": reading.interval.n}


def _word(confirmed: Reading) -> str:
    """How far the reporting part agrees: beyond the interval, by the mean, or not at all."""
    if not confirmed.met:
        return "no"
    return "yes" if confirmed.sure else "mean"


def _values(quality: Quality, name: str) -> NDArray[np.float64]:
    measured, named = quality
    return measured.per_sample if name == DIVERGENCE else named[name]


def _bytes(point: FrontierPoint) -> int:
    return int(Fraction(point.used))


def _unit(target: Target) -> str:
    return f" {target.unit}".rstrip()
