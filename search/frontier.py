"""The Pareto-optimal plans over one resource, each with its certificate.

Supported plans are those that some price of the resource makes cheapest; they are corners of the curve.
Between two of them lie plans that no price finds: `between` finds all of those by exact solves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from search.budget import Limit
from search.compile import Compiled, resource_row
from search.deadline import Deadline
from search.prepared import Prepared
from search.problem import DEFAULT_GAP, Choice, Problem, Row, Solution, Status, relative_gap
from search.solve import solve

MOST_SOLVES = 400
BETWEEN_SECONDS = 20.0


@dataclass(frozen=True)
class FrontierPoint:
    """One plan: what it uses of the resource (exact, in its unit) and its summed metric.

    No plan that uses as much or less is better than `bound`; `gap` is the relative distance. A supported plan
    is optimal at `price`, what a unit of the resource costs in the metric; None where the bound was proven by
    a solve at its own total.
    """

    choice: Choice
    used: Fraction
    objective: float
    bound: float
    gap: float
    price: float | None


@dataclass(frozen=True)
class Stretch:
    """The Pareto-optimal plans between two totals, by rising total.

    `rest` are the totals between which some may be missing, None when all are there.
    """

    points: tuple[FrontierPoint, ...]
    rest: tuple[Fraction, Fraction] | None


@dataclass(frozen=True)
class _Found:
    """A choice, and how far it may be from the best cost at a price per integer unit (None: at its total)."""

    choice: Choice
    price: float | None
    excess: float


def frontier(compiled: Compiled, resource: str, *, most: int = 200) -> tuple[FrontierPoint, ...]:
    """Supported plans by rising total of `resource`: at most `most` of them, both ends included.

    Ties, pins and limits on other resources hold; limits on `resource` itself are ignored. Without other
    limits all supported plans are known at once (every group's convex hull, edges sorted by slope) and are
    thinned evenly to `most`; with other limits each point is an exact solve, most of them where the curve
    bends. Empty when the other limits cannot be met. Raises BudgetError for an unknown resource.
    """
    problem, row = _freed(compiled, resource)
    if not problem.offered.any(axis=1).all():
        return ()
    found = _by_slopes(problem, row, most) if not problem.rows else _by_solves(problem, row, most)
    return tuple(_certified(problem, row, one) for one in found)


def between(
    compiled: Compiled,
    resource: str,
    low: Fraction,
    high: Fraction,
    *,
    most: int = 100,
    seconds: float = BETWEEN_SECONDS,
) -> Stretch:
    """Every Pareto-optimal plan whose total of `resource` is from `low` to `high`, supported or not.

    Each is a solve to a gap of 0, from the top down: the best plan of at most this total, then of at most a
    unit less than it uses, and so on. The `most` largest are given, fewer when `seconds` are over. What holds
    is as for `frontier`. Raises BudgetError for an unknown resource.
    """
    problem, row = _freed(compiled, resource)
    deadline = Deadline.after(seconds)
    floor, ceiling = math.ceil(low / row.unit), math.floor(high / row.unit)
    prepared = Prepared(problem.under((*problem.rows, replace(row, relation="<=", limit=ceiling))))
    others = [other.limit for other in problem.rows]
    found: list[FrontierPoint] = []
    while ceiling >= floor:
        solution = prepared.attempt([*others, ceiling], 0.0, deadline)
        if solution.status is Status.INFEASIBLE:
            break
        if solution.choice is None or not _proven(solution):
            return _unfinished(found[:-1], low, found[-1].used if found else high)
        point = _certified(problem, row, _Found(solution.choice, None, _distance(solution)))
        if found and _exact(problem, point.choice) == _exact(problem, found[-1].choice):
            found.pop()
        ceiling = row.total(point.choice) - 1
        if point.used < low:
            break
        if len(found) == most:
            return _unfinished(found, low, point.used)
        found.append(point)
    return Stretch(tuple(reversed(found)), None)


def _unfinished(found: Sequence[FrontierPoint], low: Fraction, high: Fraction) -> Stretch:
    return Stretch(tuple(reversed(found)), (low, high))


def _freed(compiled: Compiled, resource: str) -> tuple[Problem, Row]:
    """The problem without limits on a resource, and the resource as a row."""
    row = resource_row(compiled, Limit(resource, "<=", Fraction(1)))
    others = tuple(other for other in compiled.problem.rows if other.resource != resource)
    return replace(compiled.problem, rows=others), row


def _certified(problem: Problem, row: Row, found: _Found) -> FrontierPoint:
    objective = problem.objective(found.choice)
    bound = objective - found.excess if problem.direction == "min" else objective + found.excess
    return FrontierPoint(
        found.choice,
        row.total(found.choice) * row.unit,
        objective,
        bound,
        relative_gap(objective, bound, problem.direction),
        None if found.price is None else found.price / float(row.unit),
    )


def _proven(solution: Solution) -> bool:
    return solution.gap is not None and solution.gap <= DEFAULT_GAP


def _distance(solution: Solution) -> float:
    """How far the answer may be from the best, in cost."""
    if solution.objective is None or solution.bound is None:
        return math.inf
    return abs(solution.objective - solution.bound)


def _exact(problem: Problem, choice: Choice) -> Fraction:
    return sum((Fraction(float(problem.costs[g, c])) for g, c in enumerate(choice)), Fraction(0))


def _by_slopes(problem: Problem, row: Row, most: int) -> list[_Found]:
    """Walks the hull edges of all groups together, steepest gain first."""
    costs = _minimized(problem)
    start, edges = [], []
    for group in range(len(costs)):
        hull = _hull(costs[group], row.usage[group])
        start.append(hull[0])
        edges += [(_slope(costs[group], row.usage[group], a, b), group, b) for a, b in pairwise(hull)]
    edges.sort(key=lambda edge: edge[0])
    stops = {round(i) for i in np.linspace(0, len(edges), max(2, most))}
    choice = start
    found = [_at_price(costs, row, tuple(start), -edges[0][0] if edges else 0.0)]
    for done, (slope, group, scheme) in enumerate(edges, 1):
        choice[group] = scheme
        if done in stops:
            found.append(_at_price(costs, row, tuple(choice), -slope))
    return found


def _at_price(costs: NDArray[np.float64], row: Row, choice: Choice, price: float) -> _Found:
    """With its distance from the cheapest choice at the price: the sum of its reduced costs."""
    groups, chosen = np.arange(len(choice)), list(choice)
    here = row.usage[groups, chosen]
    above = costs - costs[groups, chosen][:, None]
    above = above + price * (row.usage - here[:, None]).astype(np.float64)
    return _Found(choice, price, float(np.maximum(0.0, -np.nanmin(above, axis=1)).sum()))


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


def _by_solves(problem: Problem, row: Row, most: int) -> list[_Found]:
    """Bisects the curve: the price at which two neighbors are equal finds what lies below their line."""
    ends = _ends(problem, row)
    if ends is None:
        return []
    found = {row.total(end.choice): end for end in ends}
    gaps = [tuple(sorted(found))] if len(found) == 2 else []
    solves = 0
    while gaps and len(found) < most and solves < MOST_SOLVES:
        gaps.sort(key=lambda gap: gap[1] - gap[0])
        left, right = gaps.pop()
        middle = _between(problem, row, found[left].choice, found[right].choice)
        solves += 1
        if middle is not None and left < row.total(middle.choice) < right:
            total = row.total(middle.choice)
            found[total] = middle
            gaps += [(left, total), (total, right)]
    return [found[total] for total in sorted(found)]


def _ends(problem: Problem, row: Row) -> Sequence[_Found] | None:
    """The plan of the least usage (cheapest of those) and the cheapest plan."""
    usage = np.where(problem.offered, row.usage.astype(np.float64), np.nan)
    lowest = solve(replace(problem, costs=usage, direction="min"), gap=0.0)
    cheapest = solve(problem)
    if lowest.choice is None or cheapest.choice is None:
        return None
    tight = replace(row, relation="<=", limit=row.total(lowest.choice))
    first = solve(replace(problem, rows=(*problem.rows, tight)))
    least = _Found(first.choice or lowest.choice, None, _distance(first))
    return least, _Found(cheapest.choice, 0.0, _distance(cheapest))


def _between(problem: Problem, row: Row, left: Choice, right: Choice) -> _Found | None:
    """The best plan at the price that makes two neighbors equal, if it beats them there."""
    sign = 1.0 if problem.direction == "min" else -1.0
    gain = sign * (problem.objective(left) - problem.objective(right))
    price = gain / (row.total(right) - row.total(left))
    if price <= 0:
        return None
    priced = _minimized(problem) + price * row.usage.astype(np.float64)
    scalar = replace(problem, costs=priced, direction="min")
    solution = solve(scalar)
    if solution.choice is None or scalar.objective(solution.choice) >= scalar.objective(left) * (1 - 1e-12):
        return None
    return _Found(solution.choice, price, _distance(solution))


def _minimized(problem: Problem) -> NDArray[np.float64]:
    return problem.costs if problem.direction == "min" else -problem.costs
