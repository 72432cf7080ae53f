"""Metric decoupling: layers that different metrics judge get budgets of their own, in a swept ratio.

Their scores have different units, so no sum over all layers means anything: each part is solved by itself
under its share of every limit, for several ratios, and the plans are measured (MixDQ, Zhao et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from search.budget import BITS_PER_WEIGHT
from search.compile import Compiled, CompileError
from search.problem import Choice, Problem, Row, Solution
from search.refine import Candidate

RATIOS = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0, 4.0)
"""Bits per weight of one part over those of the rest."""
SIZES = ("bytes", BITS_PER_WEIGHT)


@dataclass(frozen=True)
class Part:
    """The groups of a problem that one metric decides, and the parameters of each."""

    metric: str
    groups: tuple[int, ...]
    parameters: tuple[int, ...]


def parts_of(compiled: Compiled, decided: Mapping[str, str]) -> tuple[Part, ...]:
    """The parts by first appearance. `decided` maps layers to metrics; layers of a group must have the same.

    Raises CompileError for a group that two metrics decide, and for fused candidates.
    """
    compiled.refuse_fused("Metric decoupling")
    groups: dict[str, list[int]] = {}
    for group, layers in enumerate(compiled.groups):
        names = [compiled.table.layers[layer].name for layer in layers]
        metrics = {decided[name]: name for name in names}
        if len(metrics) > 1:
            (first, layer), (second, other) = list(metrics.items())[:2]
            raise CompileError(
                f"Tied layers must be decided by one metric. Got {layer} by {first} and {other} by {second}. "
                "Give them one in role_metrics, or untie them."
            )
        groups.setdefault(decided[names[0]], []).append(group)
    return tuple(
        Part(metric, tuple(members), tuple(_parameters(compiled, group) for group in members))
        for metric, members in groups.items()
    )


def sweep(
    compiled: Compiled,
    decided: Mapping[str, str],
    solve: Callable[[Problem], Solution],
    ratios: Sequence[float] = RATIOS,
) -> Iterator[Candidate]:
    """One plan per ratio: a part solved under its share of every limit, the rest under what that leaves.

    With more than two parts each one is set against the others in turn. Ratios under which nothing fits are
    passed over, and so are plans that came before. Raises CompileError as `parts_of` does.
    """
    parts = parts_of(compiled, decided)
    seen: set[Choice] = set()
    for first in parts[: 1 if len(parts) == 2 else len(parts)] if len(parts) > 1 else ():
        rest = [part for part in parts if part is not first]
        for ratio in ratios:
            choice = solve_parts(compiled.problem, [first, *rest], ratio, solve)
            if choice is not None and choice not in seen:
                seen.add(choice)
                yield Candidate(f"decoupled {first.metric} x {ratio:g}", compiled.assignment(choice))


def solve_parts(
    problem: Problem, parts: Sequence[Part], ratio: float, solve: Callable[[Problem], Solution]
) -> Choice | None:
    """Solve the parts one after the other, the first with `ratio` times the bits of each other one.

    Every part but the last has its share of each limit, the last all that is left: no room is given away.
    None where a part has no choice.
    """
    chosen: dict[int, int] = {}
    for position, part in enumerate(parts):
        rows = tuple(_row_of(row, part, _limit(row, parts, position, ratio, chosen)) for row in problem.rows)
        own = Problem(problem.costs[list(part.groups)].copy(), rows, problem.direction)
        solution = solve(own)
        if solution.choice is None:
            return None
        chosen |= dict(zip(part.groups, solution.choice, strict=True))
    return tuple(chosen[group] for group in range(len(problem.costs)))


def _row_of(row: Row, part: Part, limit: int) -> Row:
    return Row(row.resource, row.relation, row.usage[list(part.groups)].copy(), limit, row.unit)


def _limit(row: Row, parts: Sequence[Part], position: int, ratio: float, chosen: Mapping[int, int]) -> int:
    """What a part may use: its share of the whole limit, or for the last one what the others left."""
    if position == len(parts) - 1:
        return row.limit - sum(int(row.usage[group, scheme]) for group, scheme in chosen.items())
    sizes = [Fraction(_size(row, part)) for part in parts]
    sizes[0] *= Fraction(ratio)
    share = row.limit * sizes[position] / (sum(sizes) or 1)
    return math.floor(share) if row.relation == "<=" else math.ceil(share)


def _size(row: Row, part: Part) -> int:
    """How large a part is to a limit: for sizes the parameters of the groups that it is about, those that use
    some of it; else its largest usage.
    """
    largest = np.abs(row.usage[list(part.groups)]).max(axis=1)
    if row.resource.partition("[")[0] not in SIZES:
        return int(largest.sum())
    return sum(size for size, used in zip(part.parameters, largest, strict=True) if used)


def _parameters(compiled: Compiled, group: int) -> int:
    return sum(compiled.table.layers[layer].parameters for layer in compiled.groups[group])
