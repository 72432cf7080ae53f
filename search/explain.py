"""Why a plan is as it is: what one step would change, by how much each choice won, what restrictions cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.compile import Compiled
from search.core import least_open
from search.deadline import Deadline
from search.prices import shadow_prices
from search.problem import Choice, Problem, Solution, Status, named_rows
from search.question import Question, Restriction
from search.rate_distortion import Reference, rate_distortion
from search.solve import solve
from search.stability import stability

EXPLAIN_SECONDS = 20.0
DRAWS, FEWEST_DRAWS = 200, 20
MOST_CELLS = 10_000_000
"""Cells of all draws together; a table of many cells gets fewer draws."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """The next larger or smaller scheme, and what changing to it alone adds to metric and resources."""

    scheme: str
    loss: float
    resources: Mapping[str, Fraction]


@dataclass(frozen=True)
class Decision:
    """One choice: a layer, or layers that are tied or that fused candidates hang together.

    A scheme of the last is said as in `q=w4, k+v=w8 fused`; choices that another one equals or beats in every
    metric and resource of the table are no steps and no alternatives there.

    `alternative` is the scheme that would win next at the shadow prices, and `margin` how much better its
    score would have to be for that: the difference of reduced costs. Below 0 the scheme was taken only to
    fill what room was left. `stability` is the share of draws that give the same scheme; None without
    standard errors. Layers without another choice have neither.
    """

    layers: tuple[str, ...]
    scheme: str
    objective: float
    up: Step | None
    down: Step | None
    alternative: str | None
    margin: float | None
    stability: float | None


@dataclass(frozen=True)
class Relief:
    """What leaving out one restriction (or all) would bring: the best objective then, at the same limits.

    `share` is the part of today's objective that the restriction costs. Both are None where time was up;
    `unscored` choices that it forbids have no score, so that it may cost more.
    """

    kind: str
    name: str
    objective: float | None
    share: float | None
    unscored: int = 0


@dataclass(frozen=True)
class Explanation:
    """A plan explained. `optimum` is the best objective under everything that was asked, `objective` this
    plan's (larger where measurements chose another plan).

    A margin above `excess`, the distance of the plan from the bound at the shadow prices, is proven: every
    plan with that alternative is worse.
    """

    metric: str
    objective: float
    optimum: float
    prices: Mapping[str, float]
    excess: float
    decisions: tuple[Decision, ...]
    reliefs: tuple[Relief, ...]
    reference: Reference | None
    draws: int


def explain(
    question: Question,
    solution: Solution,
    assignment: Mapping[str, str] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    seconds: float = EXPLAIN_SECONDS,
) -> Explanation:
    """Explains `assignment` (by default the solution's own plan) of a question that `solution` answers.

    Restrictions that cannot be tried within `seconds` are listed without a price.
    """
    compiled, deadline = question.compiled(), Deadline.after(seconds)
    assert solution.choice is not None, "only plans are explained"
    plan = solution.choice if assignment is None else compiled.choice(assignment)
    prices = dict(solution.prices) or shadow_prices(compiled.problem)
    priced = priced_costs(compiled.problem, prices)
    done = _affordable(compiled.problem, draws)
    stable = _stability(compiled, plan, done, seed)
    named, fused = compiled.assignment(plan), compiled.fused(plan)
    return Explanation(
        compiled.metric,
        compiled.objective(named, fused),
        compiled.problem.objective(solution.choice),
        prices,
        excess_of(compiled.problem, plan, prices, priced),
        tuple(_decision(compiled, plan, group, priced, stable) for group in range(len(plan))),
        reliefs(question, solution, deadline),
        None if fused else rate_distortion(compiled.table, compiled.metric, named),
        0 if stable is None else done,
    )


def priced_costs(problem: Problem, prices: Mapping[str, float]) -> Floats:
    """Shape (groups, schemes): cost to minimize plus usage at the prices; infinite where nothing is offered.

    Usage counts from each group's least.
    """
    priced = problem.costs * (1.0 if problem.direction == "min" else -1.0)
    for name, row in named_rows(problem).items():
        usage, _ = row.upper()
        above = (usage - least_open(usage, problem.offered)[:, None]).astype(np.float64)
        priced = priced + above * (prices[name] * float(row.unit))
    return np.where(problem.offered, priced, np.inf)


def excess_of(problem: Problem, plan: Choice, prices: Mapping[str, float], priced: Floats) -> float:
    """How far a plan is from the Lagrangian bound at the prices: its reduced costs and what its slack is
    worth.
    """
    reduced = priced[np.arange(len(plan)), list(plan)] - priced.min(axis=1)
    slack = sum(
        prices[name] * float(abs(row.limit - row.total(plan)) * row.unit)
        for name, row in named_rows(problem).items()
    )
    return float(reduced.sum()) + slack


def reliefs(question: Question, solution: Solution, deadline: Deadline) -> tuple[Relief, ...]:
    """What each restriction costs, left out in turn, and all of them together where there are several."""
    restrictions = question.restrictions
    found = [_relief(question, [one], one.kind, one.name, solution, deadline) for one in restrictions]
    if len(restrictions) > 1:
        found.append(_relief(question, restrictions, "all", "all together", solution, deadline))
    return tuple(found)


def _relief(
    question: Question,
    left_out: Sequence[Restriction],
    kind: str,
    name: str,
    solution: Solution,
    deadline: Deadline,
) -> Relief:
    unscored = sum(one.unscored for one in left_out)
    if deadline.passed():
        return Relief(kind, name, None, None, unscored)
    freed = question.compiled(left_out)
    found = solve(freed.problem, time_limit=max(0.1, deadline.left()))
    best, now = found.objective, solution.objective
    if best is None or now is None or found.status is not Status.OPTIMAL:
        return Relief(kind, name, None, None, unscored)
    lost = now - best if freed.problem.direction == "min" else best - now
    return Relief(kind, name, best, max(0.0, lost) / abs(now) if now else 0.0, unscored)


def _affordable(problem: Problem, draws: int) -> int:
    return min(draws, max(FEWEST_DRAWS, MOST_CELLS // problem.costs.size))


def _stability(compiled: Compiled, plan: Choice, draws: int, seed: int) -> Floats | None:
    """None where the metric has no standard errors. Errors of layers and of candidates' own scores are
    independent.
    """
    stderr = compiled.table.metrics[compiled.metric].stderr
    if stderr is None or np.isnan(stderr).all() or not draws:
        return None
    squares = np.nan_to_num(stderr) ** 2
    grouped = np.zeros(compiled.problem.costs.shape)
    for group, layers in enumerate(compiled.groups):
        if group not in compiled.covers:
            grouped[group, : squares.shape[1]] = np.sqrt(squares[list(layers)].sum(axis=0))
    shared = {group: _shared_errors(compiled, group) for group in compiled.covers}
    return stability(compiled.problem, grouped, plan, draws, seed, shared)


def _shared_errors(compiled: Compiled, group: int) -> Floats:
    """Shape (scores, covers): the standard error of each score where a cover of the group has it, else 0."""
    table, options = compiled.table, compiled.covers[group].options
    metric = table.metrics[compiled.metric]
    parts: dict[tuple[int, int] | int, list[int]] = {}
    for position, cover in enumerate(options):
        own = dict(zip(compiled.groups[group], cover.columns, strict=True))
        for index in cover.fused:
            if compiled.metric in table.fused[index].metrics:
                parts.setdefault(index, []).append(position)
                for layer, _ in table.fused_cells(table.fused[index]):
                    del own[layer]
        for cell in own.items():
            parts.setdefault(cell, []).append(position)
    errors = np.zeros((len(parts), len(options)))
    for row, (part, positions) in zip(errors, parts.items(), strict=True):
        if isinstance(part, int):
            row[positions] = table.fused[part].stderr.get(compiled.metric, 0.0)
        elif metric.stderr is not None:
            row[positions] = np.nan_to_num(metric.stderr[part])
    return errors


def _decision(
    compiled: Compiled, plan: Choice, group: int, priced: Floats, stable: Floats | None
) -> Decision:
    problem, chosen = compiled.problem, plan[group]
    others = [int(cell) for cell in np.flatnonzero(problem.offered[group]) if cell != chosen]
    nearest = min(others, key=lambda cell: float(priced[group, cell]), default=None)
    return Decision(
        tuple(compiled.table.layers[layer].name for layer in compiled.groups[group]),
        compiled.label(group, chosen),
        float(problem.costs[group, chosen]),
        *_steps(compiled, group, chosen, others),
        None if nearest is None else compiled.label(group, nearest),
        None if nearest is None else float(priced[group, nearest] - priced[group, chosen]),
        None if stable is None or nearest is None else float(stable[group]),
    )


def _steps(
    compiled: Compiled, group: int, chosen: int, others: Sequence[int]
) -> tuple[Step | None, Step | None]:
    """The next scheme up and the next one down by size; of equal sizes the one that loses least."""
    size = _sizes(compiled, group, [chosen, *others])
    sign = 1.0 if compiled.problem.direction == "min" else -1.0
    loss = compiled.problem.costs[group] * sign
    up = [cell for cell in others if size[cell] > size[chosen]]
    down = [cell for cell in others if size[cell] < size[chosen]]
    return (
        _step(compiled, group, chosen, min(up, key=lambda cell: (size[cell], loss[cell]), default=None)),
        _step(compiled, group, chosen, min(down, key=lambda cell: (-size[cell], loss[cell]), default=None)),
    )


def _sizes(compiled: Compiled, group: int, cells: Sequence[int]) -> dict[int, Fraction]:
    """What steps go by: bytes, or where they do not differ the first resource that does (a cache's bytes)."""
    resources = compiled.table.resources
    for name in sorted(resources, key=lambda name: name != "bytes"):
        size = {cell: compiled.used(name, group, cell) for cell in cells}
        if len(set(size.values())) > 1:
            return size
    return dict.fromkeys(cells, Fraction(0))


def _step(compiled: Compiled, group: int, chosen: int, cell: Any) -> Step | None:
    if cell is None:
        return None
    changes = {
        name: compiled.used(name, group, cell) - compiled.used(name, group, chosen)
        for name in compiled.table.resources
    }
    loss = float(compiled.problem.costs[group, cell] - compiled.problem.costs[group, chosen])
    return Step(compiled.label(group, cell), loss, changes)
