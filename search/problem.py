"""What a solver takes and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from search.budget import Relation

Choice = tuple[int, ...]
IntMatrix = NDArray[Any]
"""Exact integers: dtype int64 where every total fits, Python integers (dtype object) where not."""

SMALLEST_OBJECTIVE = 1e-12
DEFAULT_GAP = 1e-9
SAFE_TOTAL = 2**61


class ProblemError(ValueError):
    """Arrays that do not fit together."""


class Status(StrEnum):
    """What is known of an answer. Only `optimal` and `infeasible` are proven."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False)
class Row:
    """One limit on integers: the usage of the chosen cells sums to at most (at least) `limit`.

    `usage` has shape (groups, schemes); cells that are not offered hold 0. One integer stands for `unit` of
    the resource, so `limit * unit` is the limit in its own unit (rounded toward the strict side).
    """

    resource: str
    relation: Relation
    usage: IntMatrix
    limit: int
    unit: Fraction = Fraction(1)

    def __post_init__(self) -> None:
        largest = max(abs(int(self.usage.max(initial=0))), abs(int(self.usage.min(initial=0))))
        safe = largest * max(1, len(self.usage)) < SAFE_TOTAL
        object.__setattr__(self, "usage", self.usage.astype(np.int64 if safe else object, copy=False))
        self.usage.setflags(write=False)

    def total(self, choice: Sequence[int]) -> int:
        """Usage of a choice, exact."""
        return exact_total(self.usage, choice)

    def holds(self, choice: Sequence[int]) -> bool:
        """Whether a choice keeps the limit, decided on integers."""
        total = self.total(choice)
        return total <= self.limit if self.relation == "<=" else total >= self.limit

    def upper(self) -> tuple[IntMatrix, int]:
        """The same limit as "at most": (usage, limit), both negated for ">="."""
        return (self.usage, self.limit) if self.relation == "<=" else (-self.usage, -self.limit)


@dataclass(frozen=True, eq=False)
class Problem:
    """Pick one scheme per group: minimize (or maximize) the summed cost under the rows.

    `costs` has shape (groups, schemes), float64, NaN where a scheme is not offered.
    """

    costs: NDArray[np.float64]
    rows: tuple[Row, ...] = ()
    direction: Literal["min", "max"] = "min"
    groups: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.costs.ndim != 2 or not self.costs.size:
            raise ProblemError(f"Costs must have shape (groups, schemes), not empty. Got {self.costs.shape}.")
        object.__setattr__(self, "groups", self.groups or tuple(map(str, range(self.costs.shape[0]))))
        object.__setattr__(self, "schemes", self.schemes or tuple(map(str, range(self.costs.shape[1]))))
        self._refuse_infinity()
        for row in self.rows:
            if row.usage.shape != self.costs.shape:
                raise ProblemError(
                    f"Usage of {row.resource} must have the shape of the costs, {self.costs.shape}. "
                    f"Got {row.usage.shape}."
                )
        self.costs.setflags(write=False)

    def _refuse_infinity(self) -> None:
        for group, scheme in np.argwhere(np.isinf(self.costs))[:1]:
            raise ProblemError(
                f"Costs must be finite or NaN (not offered). Got {self.costs[group, scheme]} for "
                f"{self.groups[group]} x {self.schemes[scheme]}. Measure it again or do not offer it."
            )

    @property
    def offered(self) -> NDArray[np.bool_]:
        """Shape (groups, schemes)."""
        return ~np.isnan(self.costs)

    def under(self, rows: tuple[Row, ...]) -> Problem:
        """The same costs under other rows."""
        return replace(self, rows=rows)

    def objective(self, choice: Sequence[int]) -> float:
        """Summed cost of a choice, correctly rounded."""
        return math.fsum(self.costs[np.arange(len(choice)), list(choice)].tolist())

    def feasible(self, choice: Sequence[int]) -> bool:
        """Whether a choice is offered and keeps every limit, decided on integers."""
        offered = not np.isnan(self.costs[np.arange(len(choice)), list(choice)]).any()
        return bool(offered) and all(row.holds(choice) for row in self.rows)


@dataclass(frozen=True)
class Solution:
    """An answer and what is proven about it.

    `bound`: no choice is better than this. `gap`: see `relative_gap`. `least_budget` (infeasible only): per
    limited resource the value its limit would need, see `search.solve.least_budget`. `prices`: what each
    limit costs, see `search.prices.shadow_prices`; `search.solve.solve` gives them where asked for. `seconds`
    is the solve alone; `method` names what decided, `why` says why that one did, `log` tells all that the
    solver did.
    """

    status: Status
    choice: Choice | None = None
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    seconds: float = 0.0
    solver: str = ""
    least_budget: Mapping[str, Fraction] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    method: str = ""
    why: str = ""
    log: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "least_budget", MappingProxyType(dict(self.least_budget)))
        object.__setattr__(self, "prices", MappingProxyType(dict(self.prices)))


def named_rows(problem: Problem) -> dict[str, Row]:
    """The limits by what they limit; the second one of a resource as `resource>=` (or `resource<=`)."""
    named: dict[str, Row] = {}
    for row in problem.rows:
        named[row.resource if row.resource not in named else f"{row.resource}{row.relation}"] = row
    return named


def relative_gap(objective: float, bound: float, direction: str = "min") -> float:
    """(objective - bound) / max(1e-12, |objective|), sign turned when maximizing; never below 0.

    >>> relative_gap(10.0, 9.0), relative_gap(10.0, 11.0, "max")
    (0.1, 0.1)
    """
    distance = objective - bound if direction == "min" else bound - objective
    return max(0.0, distance / max(SMALLEST_OBJECTIVE, abs(objective)))


def integer_matrix(rows: Sequence[Sequence[int]]) -> IntMatrix:
    """Integers as an array: int64 where sums over all groups are safe, Python integers otherwise."""
    largest = sum(max((abs(value) for value in row), default=0) for row in rows)
    return np.array(rows, dtype=np.int64 if largest < SAFE_TOTAL else object)


def exact_total(usage: IntMatrix, choice: Sequence[int]) -> int:
    """Summed usage (groups, schemes) of a choice, exact."""
    return int(usage[np.arange(len(choice)), list(choice)].sum())


def answered(
    problem: Problem, choice: Choice, bound: float, target: float, *, proven: bool = False
) -> Solution:
    """A feasible answer with its certificate; `proven`: an exhaustive search found nothing better."""
    objective = problem.objective(choice)
    if proven:
        bound = objective
    bound = min(bound, objective) if problem.direction == "min" else max(bound, objective)
    gap = relative_gap(objective, bound, problem.direction)
    status = Status.OPTIMAL if gap <= target else Status.FEASIBLE
    return Solution(status, choice, objective, bound, gap)
