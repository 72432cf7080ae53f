"""The supported Pareto-optimal plans over one resource: those that some price of the resource makes
cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from search.budget import Limit
from search.compile import Compiled, resource_row
from search.problem import Choice, Problem, Row
from search.solve import solve

MOST_SOLVES = 400


@dataclass(frozen=True)
class FrontierPoint:
    """One plan: what it uses of the resource (exact, in its unit) and its summed metric."""

    choice: Choice
    used: Fraction
    objective: float


def frontier(compiled: Compiled, resource: str, *, most: int = 200) -> tuple[FrontierPoint, ...]:
    """Supported plans by rising total of `resource`: at most `most` of them, both ends included.

    Ties, pins and limits on other resources hold; limits on `resource` itself are ignored. Without other
    limits all supported plans are known at once (every group's convex hull, edges sorted by slope) and are
    thinned evenly to `most`; with other limits each point is an exact solve, most of them where the curve
    bends. Empty when the other limits cannot be met. Raises BudgetError for an unknown resource.
    """
    row = resource_row(compiled, Limit(resource, "<=", Fraction(1)))
    others = tuple(other for other in compiled.problem.rows if other.resource != resource)
    problem = replace(compiled.problem, rows=others)
    if not problem.offered.any(axis=1).all():
        return ()
    choices = _by_slopes(problem, row, most) if not others else _by_solves(problem, row, most)
    return tuple(
        FrontierPoint(choice, row.total(choice) * row.unit, problem.objective(choice)) for choice in choices
    )


def _by_slopes(problem: Problem, row: Row, most: int) -> list[Choice]:
    """Walks the hull edges of all groups together, steepest gain first."""
    costs = _minimized(problem)
    start, edges = [], []
    for group in range(len(costs)):
        hull = _hull(costs[group], row.usage[group])
        start.append(hull[0])
        edges += [(_slope(costs[group], row.usage[group], a, b), group, b) for a, b in pairwise(hull)]
    edges.sort(key=lambda edge: edge[0])
    stops = {round(i) for i in np.linspace(0, len(edges), max(2, most))}
    choice, found = start, [tuple(start)]
    for done, (_, group, scheme) in enumerate(edges, 1):
        choice[group] = scheme
        if done in stops:
            found.append(tuple(choice))
    return found


def _hull(costs: NDArray[np.float64], usage: NDArray[np.int64]) -> list[int]:
    """Schemes on the lower convex hull of (usage, cost), by rising usage and falling cost."""
    order = [int(i) for i in np.lexsort((costs, usage.astype(np.float64))) if not np.isnan(costs[i])]
    hull: list[int] = []
    for scheme in order:
        if hull and costs[scheme] >= costs[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(costs, usage, hull[-2], hull[-1]) >= _slope(
            costs, usage, hull[-1], scheme
        ):
            hull.pop()
        hull.append(scheme)
    return hull


def _slope(costs: NDArray[np.float64], usage: NDArray[np.int64], a: int, b: int) -> float:
    return float(costs[b] - costs[a]) / float(int(usage[b]) - int(usage[a]))


def _by_solves(problem: Problem, row: Row, most: int) -> list[Choice]:
    """Bisects the curve: the price at which two neighbors are equal finds what lies below their line."""
    ends = _ends(problem, row)
    if ends is None:
        return []
    found = {row.total(choice): choice for choice in ends}
    gaps = [tuple(sorted(found))] if len(found) == 2 else []
    solves = 0
    while gaps and len(found) < most and solves < MOST_SOLVES:
        gaps.sort(key=lambda gap: gap[1] - gap[0])
        left, right = gaps.pop()
        middle = _between(problem, row, found[left], found[right])
        solves += 1
        if middle is not None and left < row.total(middle) < right:
            found[row.total(middle)] = middle
            gaps += [(left, row.total(middle)), (row.total(middle), right)]
    return [found[total] for total in sorted(found)]


def _ends(problem: Problem, row: Row) -> Sequence[Choice] | None:
    """The plan of the least usage (cheapest of those) and the cheapest plan."""
    usage = np.where(problem.offered, row.usage.astype(np.float64), np.nan)
    lowest = solve(replace(problem, costs=usage, direction="min"), gap=0.0)
    cheapest = solve(problem)
    if lowest.choice is None or cheapest.choice is None:
        return None
    tight = replace(row, relation="<=", limit=row.total(lowest.choice))
    first = solve(replace(problem, rows=(*problem.rows, tight))).choice or lowest.choice
    return first, cheapest.choice


def _between(problem: Problem, row: Row, left: Choice, right: Choice) -> Choice | None:
    """The best plan at the price that makes two neighbors equal, if it beats them there."""
    sign = 1.0 if problem.direction == "min" else -1.0
    gain = sign * (problem.objective(left) - problem.objective(right))
    price = gain / (row.total(right) - row.total(left))
    if price <= 0:
        return None
    priced = _minimized(problem) + price * row.usage.astype(np.float64)
    scalar = replace(problem, costs=priced, direction="min")
    found = solve(scalar).choice
    if found is None or scalar.objective(found) >= scalar.objective(left) * (1 - 1e-12):
        return None
    return found


def _minimized(problem: Problem) -> NDArray[np.float64]:
    return problem.costs if problem.direction == "min" else -problem.costs
