"""What an objective takes and what it gives back, and what several of them are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from search.budget import Relation, close_names
from search.catalog import AUTO, SOLVERS
from search.compile import Compiled
from search.core import exact_integers
from search.covers import Quantity
from search.deadline import Deadline
from search.problem import DEFAULT_GAP, Choice, Problem, Row, Solution, Status, relative_gap
from search.solve import solve
from sensitivity.table import MetricTable

Floats = NDArray[np.float64]
LOOSE = 1.0
"""A gap at which any choice will do."""
LEAST_SECONDS = 0.01


class ObjectiveError(ValueError):
    """An objective that cannot be read, or names what the table does not have."""


@dataclass(frozen=True)
class How:
    """How to solve: solver, target gap, and until when; `prices`: with the limits' shadow prices."""

    solver: str = "auto"
    gap: float = DEFAULT_GAP
    deadline: Deadline = field(default_factory=Deadline)
    prices: bool = False

    def solve(self, problem: Problem, gap: float | None = None) -> Solution:
        """The front door for the time that is left."""
        left = self.deadline.left()
        return solve(
            problem,
            solver=self.solver,
            gap=self.gap if gap is None else gap,
            time_limit=None if math.isinf(left) else max(LEAST_SECONDS, left),
            prices=self.prices and gap is None,
        )

    def attempt(self, problem: Problem, gap: float) -> Solution:
        """The same where "infeasible" is a step of a proof and needs no explanation."""
        return SOLVERS[AUTO if self.solver == "auto" else self.solver].solve(problem, gap, self.deadline)


@dataclass(frozen=True)
class Part:
    """One number of an answer; `bound` and `gap` where something is proven about it."""

    name: str
    value: float
    bound: float | None = None
    gap: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As answers show it."""
        return {"name": self.name, "value": self.value, "bound": self.bound, "gap": self.gap}


@dataclass(frozen=True)
class Optimum:
    """A solution for an objective. `solution` has the objective's own value with what is proven about it;
    where stages follow each other, those of the last one, `optimal` only if every stage is. `parts` are all
    numbers that the objective is about.
    """

    solution: Solution
    parts: tuple[Part, ...] = ()


class Objective(Protocol):
    """What is minimized (or maximized) under the limits of a problem."""

    @property
    def text(self) -> str:
        """The objective as it is written; reading it gives the same one."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it names, beside the deciding one."""

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem with the rules that every plan of this objective must keep."""

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """The best choice of a problem that `constrained` gave."""


@dataclass(frozen=True)
class Entry:
    """One objective of the catalog: what it means, how it is written, how it is read. `names_all`: the
    metrics that it names are all that it is about, so that no other one decides.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    read: Callable[[str], Objective]
    names_all: bool = False


def metric_of(compiled: Compiled, name: str) -> MetricTable:
    """A metric of the table. Raises ObjectiveError for one that it does not have."""
    metrics = compiled.table.metrics
    if name not in metrics:
        raise ObjectiveError(
            f"A metric of an objective must be in the table. Got {name!r}. {close_names(name, metrics)}"
        )
    return metrics[name]


def costs_of(compiled: Compiled, name: str) -> Floats:
    """A metric by (group, cell), NaN where nothing is offered or scored. Raises ObjectiveError for one that
    is not in the table.
    """
    return _grouped(compiled, metric_of(compiled, name).values, Quantity("score", name))


def errors_of(compiled: Compiled, name: str) -> Floats:
    """A metric's standard errors by (group, cell), added up; NaN where nothing is offered or known."""
    stderr = metric_of(compiled, name).stderr
    if stderr is None:
        return np.full(compiled.problem.costs.shape, np.nan)
    return _grouped(compiled, stderr, Quantity("error", name))


def _grouped(compiled: Compiled, values: Floats, quantity: Quantity) -> Floats:
    """Values (layers, schemes), which are those of a quantity, summed over the layers of each group."""
    summed = np.full(compiled.problem.costs.shape, np.nan)
    for group, cell in np.argwhere(compiled.problem.offered).tolist():
        if group in compiled.covers:
            total = compiled.covers[group].totals[quantity][cell]
            summed[group, cell] = math.nan if total is None else float(total)
        else:
            summed[group, cell] = math.fsum(values[list(compiled.groups[group]), cell])
    return summed


def without_fused(name: str, compiled: Compiled) -> None:
    """Raises ObjectiveError where the problem has fused candidates, for an objective about single layers."""
    if compiled.covers:
        raise ObjectiveError(
            f"The objective {name} must have a table without fused candidates: it is about each layer's own "
            "scheme. Got some. Take sum, weighted, lexicographic, uncertainty or worst, or leave `fused` out."
        )


def limited(name: str, costs: Floats, relation: Relation, limit: Fraction) -> Row:
    """A limit on summed float costs, in exact integers."""
    whole, unit = exact_integers(np.nan_to_num(costs))
    within = limit / unit
    return Row(name, relation, whole, math.floor(within) if relation == "<=" else math.ceil(within), unit)


def total_of(costs: Floats, choice: Sequence[int]) -> Fraction:
    """Summed costs of a choice, exact."""
    return sum((Fraction(float(costs[group, scheme])) for group, scheme in enumerate(choice)), Fraction(0))


def certified(
    choice: Choice,
    value: float,
    bound: float | None,
    how: How,
    direction: Literal["min", "max"] = "min",
    log: tuple[str, ...] = (),
) -> Solution:
    """An answer with its own value and bound; without a bound nothing is proven."""
    if bound is None or not math.isfinite(bound):
        return Solution(Status.FEASIBLE, choice, value, log=log)
    bound = min(bound, value) if direction == "min" else max(bound, value)
    gap = relative_gap(value, bound, direction)
    return Solution(Status.OPTIMAL if gap <= how.gap else Status.FEASIBLE, choice, value, bound, gap, log=log)


def any_choice(problem: Problem, how: How) -> tuple[Choice | None, bool]:
    """A choice within all limits, or None; and whether "none" is proven."""
    if not problem.offered.any(axis=1).all():
        return None, True
    if len(problem.rows) < 2:
        choice = _least_used(problem)
        return (choice, True) if problem.feasible(choice) else (None, True)
    blank = replace(problem, costs=np.where(problem.offered, 0.0, np.nan))
    found = how.attempt(blank, LOOSE)
    return found.choice, found.status is Status.INFEASIBLE


def _least_used(problem: Problem) -> Choice:
    """The choice that is best for the only limit."""
    usage = problem.rows[0].upper()[0] if problem.rows else np.zeros(problem.costs.shape, dtype=np.int64)
    most = usage.max() + 1
    return tuple(int(scheme) for scheme in np.where(problem.offered, usage, most).argmin(axis=1))


def without_arguments(name: str, arguments: str) -> None:
    """Raises ObjectiveError where an objective that takes nothing is given something."""
    if arguments:
        raise ObjectiveError(f"The objective {name} must stand alone. Got {arguments!r:.80} after it.")


def listed(name: str, arguments: str, least: int, example: str) -> list[str]:
    """Arguments between commas. Raises ObjectiveError for fewer than `least`, or an empty one."""
    found = [part.strip() for part in arguments.split(",")] if arguments else []
    if len(found) < least or not all(found):
        wanted = "a metric" if least == 1 else f"at least {least} metrics"
        raise ObjectiveError(
            f"The objective {name} must name {wanted}, as in {example!r}. Got {arguments!r:.80}."
        )
    return found


def distinct(name: str, metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics as they are. Raises ObjectiveError for one that comes twice."""
    if len(set(metrics)) < len(metrics):
        raise ObjectiveError(
            f"The objective {name} must name each metric once. Got {', '.join(metrics)[:80]!r}."
        )
    return tuple(metrics)


def short(number: float) -> str:
    """A number as short as it reads back.

    >>> short(1.0), short(0.01)
    ('1', '0.01')
    """
    return repr(number).removesuffix(".0")
