"""The order rule of HAWQ-V2: a more sensitive layer never gets fewer bits than a less sensitive one.

HAWQ-V2 cuts its Pareto frontier so. Here the rule is a set of limits in the program: one for each pair of
neighbors in the order, bits of the first less bits of the second at least 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np

from quant.kv_cache import is_cache
from quant.schemes import SchemeError, parse_scheme
from search.compile import Compiled
from search.objectives.objective import (
    LOOSE,
    Entry,
    Floats,
    How,
    ObjectiveError,
    Optimum,
    certified,
    costs_of,
    total_of,
    without_fused,
)
from search.objectives.program import Program, cost_terms, extremes, least
from search.problem import Problem, Row, Solution, Status

ROW = "rank order"
REASON = "no plan within the limits gives more sensitive layers at least as many bits"


@dataclass(frozen=True)
class RankOrder:
    """The sum of the deciding metric under the rule. Groups are ordered by their largest score in
    `ordering` (the deciding metric if None); equal ones are not ordered. Caches are left out.
    """

    ordering: str | None = None

    @property
    def text(self) -> str:
        """With the metric that orders, if it is named."""
        return "rank_order" if self.ordering is None else f"rank_order: {self.ordering}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metric that orders."""
        return () if self.ordering is None else (self.ordering,)

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem with a limit for each pair of neighbors in the order, unless it has them. Raises
        ObjectiveError for fused candidates.
        """
        without_fused("rank_order", compiled)
        if any(row.resource == ROW for row in compiled.problem.rows):
            return compiled
        bits = _bits(compiled)
        classes = _classes(compiled, costs_of(compiled, self.ordering or compiled.metric))
        rows = tuple(
            _order_row(compiled, bits, first, second)
            for above, below in pairwise(classes)
            for first in above
            for second in below
        )
        return replace(compiled, problem=replace(compiled.problem, rows=(*compiled.problem.rows, *rows)))

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """The integer program of the sum, the order written for each width: as many binaries at or above it
        in the more sensitive group as in the other.
        """
        problem = compiled.problem
        limits = tuple(row for row in problem.rows if row.resource != ROW)
        free = replace(problem, rows=limits)
        start = how.solve(free, LOOSE)
        if start.choice is None:
            return Optimum(start)
        sign = 1.0 if problem.direction == "min" else -1.0
        costs, orders = sign * problem.costs, [row for row in problem.rows if row.resource == ROW]
        span = extremes(costs)
        found = least(
            lambda unit: _program(free, costs, orders, span[0], unit),
            problem,
            lambda choice: total_of(costs, choice),
            span,
            how,
        )
        if found.choice is None:
            return Optimum(Solution(Status.INFEASIBLE if found.infeasible else Status.UNKNOWN, reason=REASON))
        bound = None if found.bound is None else sign * float(found.bound)
        value = problem.objective(found.choice)
        return Optimum(certified(found.choice, value, bound, how, problem.direction))


def _program(
    problem: Problem, costs: Floats, orders: Sequence[Row], low: Fraction, unit: Fraction
) -> Program:
    program = Program(problem, low, unit)
    program.minimize(cost_terms(program, costs))
    for row in orders:
        first, second = (int(np.flatnonzero((sign * row.usage > 0).any(axis=1))[0]) for sign in (1, -1))
        for width in sorted({abs(int(bits)) for bits in row.usage[[first, second]].flat})[1:]:
            terms = [
                (program.cells[group, int(column)], float(sign))
                for group, sign in ((first, 1), (second, -1))
                for column in np.flatnonzero(problem.offered[group])
                if abs(int(row.usage[group, column])) >= width
            ]
            program.add(terms, ">=", 0.0)
    return program


def _bits(compiled: Compiled) -> dict[int, int]:
    """Column of the table -> nominal bits of a weight, for every scheme that is not a cache's."""
    try:
        return {
            column: parse_scheme(name).weight_bits
            for column, name in enumerate(compiled.table.schemes)
            if not is_cache(name)
        }
    except SchemeError as error:
        raise ObjectiveError(
            f"The objective rank_order must know the bits of every scheme by its name. {error}"
        ) from None


def _classes(compiled: Compiled, scores: Floats) -> list[list[int]]:
    """Groups by falling sensitivity; those of one sensitivity together."""
    sign = 1.0 if compiled.table.metrics[compiled.metric].direction == "min" else -1.0
    found: dict[float, list[int]] = {}
    for group, layers in enumerate(compiled.groups):
        offered = compiled.problem.offered[group]
        if offered.any() and all(compiled.table.layers[layer].parameters for layer in layers):
            found.setdefault(float(np.nanmax(sign * scores[group][offered])), []).append(group)
    return [found[score] for score in sorted(found, reverse=True)]


def _order_row(compiled: Compiled, bits: dict[int, int], first: int, second: int) -> Row:
    usage = np.zeros(compiled.problem.costs.shape, dtype=np.int64)
    for group, sign in ((first, 1), (second, -1)):
        for column in np.flatnonzero(compiled.problem.offered[group]):
            usage[group, column] = sign * bits.get(int(column), 0)
    return Row(ROW, ">=", usage, 0)


def _read(arguments: str) -> RankOrder:
    names: Sequence[str] = [part.strip() for part in arguments.split(",")] if arguments else []
    if len(names) > 1:
        raise ObjectiveError(
            "The objective rank_order must be ordered by one metric, as in 'rank_order: hessian_trace'."
            f" Got {arguments!r:.80}."
        )
    return RankOrder(names[0] if names else None)


RANK_ORDER = Entry(
    "rank_order",
    "The sum where a more sensitive layer never gets fewer bits than a less sensitive one (HAWQ-V2); exact.",
    ("rank_order", "rank_order: hessian_trace"),
    _read,
)
