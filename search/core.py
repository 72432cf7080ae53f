"""A problem as exact integers, and what can be ruled out of it before any search.

Every float64 cost is an integer times a power of two, so costs, multipliers and limits are compared without
rounding: coefficients from 1e-12 to 1e12, or a limit one unit below a tempting total, are nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.problem import Choice, IntMatrix, Problem, exact_total

FloatMatrix = NDArray[np.float64]
Mask = NDArray[np.bool_]
MULTIPLIER_BITS = 60
NARROW = 64
"""Groups of more cells than this are looked at one by one."""
BLOCK = 64


@dataclass(eq=False)
class Core:
    """Minimize summed `cost` over one open cell per group with every summed `usage[k]` at most `limit[k]`.

    `cost` (groups, schemes) holds Python integers in units of `unit`; `open` shrinks as cells are ruled out.
    `offset`, in units too, is what groups outside the core cost.
    """

    cost: NDArray[Any]
    unit: Fraction
    usage: tuple[IntMatrix, ...]
    limit: tuple[int, ...]
    open: Mask
    offset: Fraction = Fraction(0)

    def total(self, choice: Sequence[int]) -> int:
        """Summed cost of a choice, exact, in units, without the offset."""
        return exact_total(self.cost, choice)

    def used(self, choice: Sequence[int]) -> tuple[int, ...]:
        """Summed usage of a choice per row, exact."""
        return tuple(exact_total(rows, choice) for rows in self.usage)

    def feasible(self, choice: Sequence[int]) -> bool:
        """Whether a choice keeps every limit."""
        return all(used <= limit for used, limit in zip(self.used(choice), self.limit, strict=True))

    def best(self, choices: Sequence[Choice]) -> Choice | None:
        """The cheapest feasible choice; the first of equals."""
        kept = [choice for choice in choices if self.feasible(choice)]
        return min(kept, key=self.total) if kept else None


def core_of(problem: Problem) -> Core:
    """The problem in exact integers, turned into minimization."""
    cost, unit = exact_integers(np.nan_to_num(problem.costs))
    rows = [row.upper() for row in problem.rows]
    return Core(
        cost if problem.direction == "min" else -cost,
        unit,
        tuple(usage for usage, _ in rows),
        tuple(limit for _, limit in rows),
        problem.offered.copy(),
    )


def fold(problem: Problem, opened: Mask, choice: NDArray[np.int64]) -> tuple[Core, NDArray[np.int64]]:
    """The core of the groups with several open cells, and which groups they are.

    `opened` (groups, schemes) are the open cells; the other groups keep `choice`: their usage is taken off
    the limits and their cost is the offset.
    """
    free = opened.sum(axis=1) > 1
    groups, fixed = np.flatnonzero(free), np.flatnonzero(~free)
    sign = 1 if problem.direction == "min" else -1
    cost, unit = exact_integers(np.where(opened[groups], sign * problem.costs[groups], 0.0))
    rows = [row.upper() for row in problem.rows]
    core = Core(
        cost,
        unit,
        tuple(usage[groups] for usage, _ in rows),
        tuple(limit - int(usage[fixed, choice[fixed]].sum()) for usage, limit in rows),
        opened[groups],
        sign * exact_sum(problem.costs[fixed, choice[fixed]]) / unit,
    )
    return core, groups


def exact_sum(values: FloatMatrix) -> Fraction:
    """The sum of floats without rounding.

    >>> exact_sum(np.array([1e16, 1.0, -1e16]))
    Fraction(1, 1)
    """
    if not values.size:
        return Fraction(0)
    mantissas, exponents = np.frexp(values)
    whole = (mantissas * 2.0**53).astype(np.int64)
    lowest = int(exponents.min())
    high = np.bincount(exponents - lowest, weights=whole >> 27)
    low = np.bincount(exponents - lowest, weights=whole & (2**27 - 1))
    pairs = enumerate(zip(high.tolist(), low.tolist(), strict=True))
    total = sum(((int(top) << 27) + int(bottom)) << shift for shift, (top, bottom) in pairs)
    return total * Fraction(2) ** (lowest - 53)


def exact_integers(values: FloatMatrix) -> tuple[NDArray[Any], Fraction]:
    """Integers n and a power of two u with values == n * u exactly.

    >>> exact_integers(np.array([0.5, 3.0]))
    (array([1, 6], dtype=object), Fraction(1, 2))
    """
    mantissas, exponents = np.frexp(values)
    whole = (mantissas * 2.0**53).astype(np.int64)
    used = whole != 0
    if not used.any():
        return np.zeros(values.shape, dtype=np.int64).astype(object), Fraction(1)
    trailing = np.zeros_like(whole)
    trailing[used] = np.log2((whole[used] & -whole[used]).astype(np.float64)).astype(np.int64)
    shift = exponents + trailing - 53
    lowest = int(shift[used].min())
    odd = (whole >> trailing).astype(object)
    powers = np.where(used, shift - lowest, 0).astype(object)
    return odd * (2**powers), Fraction(2) ** lowest


def shrink_by_limits(core: Core) -> bool:
    """Closes cells that fit no complete choice, judged one row at a time. False: nothing fits at all."""
    changed = True
    while changed:
        changed = False
        if not core.open.any(axis=1).all():
            return False
        for usage, limit in zip(core.usage, core.limit, strict=True):
            least = least_open(usage, core.open)
            room = limit - int(least.sum())
            if room < 0:
                return False
            misfit = core.open & np.asarray(usage - least[:, None] > room, dtype=bool)
            if misfit.any():
                core.open &= ~misfit
                changed = True
    return True


def drop_loose_rows(core: Core) -> None:
    """Drops the limits that no open choice can break."""
    rows = zip(core.usage, core.limit, strict=True)
    binding = [(usage, limit) for usage, limit in rows if int(most_open(usage, core.open).sum()) > limit]
    core.usage = tuple(usage for usage, _ in binding)
    core.limit = tuple(limit for _, limit in binding)


def drop_dominated(core: Core) -> None:
    """Closes cells that another of their group equals or beats in everything; the first of equals stays."""
    ranks = [_ranks(core.cost), *map(_ranks, core.usage)]
    for group in np.flatnonzero(core.open[:, NARROW:].any(axis=1)):
        cells = np.flatnonzero(core.open[group])
        core.open[group] = False
        core.open[group, cells[undominated(np.stack([rank[group, cells] for rank in ranks], axis=1))]] = True
    columns = range(min(NARROW, core.cost.shape[1]))
    for kept in columns:
        for other in columns:
            if kept == other:
                continue
            no_worse = core.open[:, kept] & core.open[:, other]
            equal = no_worse.copy()
            for rank in ranks:
                no_worse &= rank[:, kept] <= rank[:, other]
                equal &= rank[:, kept] == rank[:, other]
            core.open[:, other] &= ~(no_worse & (~equal if kept > other else True))


def undominated(ranks: NDArray[np.int64], most: float = math.inf) -> NDArray[np.int64]:
    """The rows of (cells, numbers) that no other one equals or beats everywhere; the first of equals. Where
    there are more than `most`, some more than that.

    >>> undominated(np.array([[2, 1], [1, 2], [2, 2], [2, 1]]))
    array([0, 1])
    """
    left = np.argsort(ranks.sum(axis=1), kind="stable")
    kept: list[int] = []
    while len(left) and len(kept) <= most:
        block, left = left[:BLOCK], left[BLOCK:]
        beaten = np.triu((ranks[block, None] <= ranks[None, block]).all(axis=2), 1).any(axis=0)
        block = block[~beaten]
        kept += block.tolist()
        left = left[~(ranks[block, None] <= ranks[None, left]).all(axis=2).any(axis=0)]
    return np.array(sorted(kept), dtype=np.int64)


def least_open(values: IntMatrix, opened: Mask) -> NDArray[Any]:
    """The smallest open value per group."""
    least: NDArray[Any] = np.where(opened, values, values.max(initial=0) + 1).min(axis=1)
    return least


def most_open(values: IntMatrix, opened: Mask) -> NDArray[Any]:
    """The largest open value per group."""
    most: NDArray[Any] = np.where(opened, values, values.min(initial=0) - 1).max(axis=1)
    return most


def unit_floats(values: NDArray[Any], opened: Mask) -> tuple[FloatMatrix, int]:
    """Open values from 0 to 1: less the group's smallest, by the largest difference (returned too)."""
    above = np.where(opened, values - least_open(values, opened)[:, None], 0)
    largest = int(above.max()) or 1
    return (above.astype(object) / largest).astype(np.float64), largest


@dataclass(frozen=True, eq=False)
class Lagrangian:
    """The exact bound of one set of multipliers, everything in cost units / 2**bits.

    Every choice costs at least `lower`; precisely `lower` + its reduced costs + multipliers times its slacks.
    """

    lower: int
    reduced: NDArray[Any]
    multipliers: tuple[int, ...]
    bits: int

    def excess(self, core: Core, choice: Sequence[int]) -> int:
        """How far a choice is above the bound."""
        return (core.total(choice) << self.bits) - self.lower


def lagrangian(core: Core, multipliers: Sequence[Fraction]) -> Lagrangian:
    """Evaluates the Lagrangian bound at multipliers (cost units per usage unit) without rounding."""
    bits = max((_bits_wanted(value) for value in multipliers if value > 0), default=0)
    whole = tuple(int(value * 2**bits) for value in multipliers)
    priced = core.cost * 2**bits
    for multiplier, usage in zip(whole, core.usage, strict=True):
        if multiplier:
            priced = priced + usage.astype(object) * multiplier
    least = least_open(priced, core.open)
    credit = sum(multiplier * limit for multiplier, limit in zip(whole, core.limit, strict=True))
    reduced = np.where(core.open, priced - least[:, None], 0)
    return Lagrangian(int(least.sum()) - credit, reduced, whole, bits)


def fix_by_bound(core: Core, bound: Lagrangian, incumbent: Choice) -> None:
    """Closes cells whose reduced cost proves that every choice with them is worse than the incumbent."""
    room = bound.excess(core, incumbent)
    core.open &= ~np.asarray(bound.reduced > room, dtype=bool)


def _bits_wanted(value: Fraction) -> int:
    magnitude = value.numerator.bit_length() - value.denominator.bit_length()
    return max(0, MULTIPLIER_BITS - magnitude)


def _ranks(values: NDArray[Any]) -> NDArray[np.int64]:
    """Order of each group's values as small integers; equal values get equal ranks."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    steps = np.zeros(values.shape, dtype=np.int64)
    steps[:, 1:] = np.cumsum(np.asarray(ordered[:, 1:] != ordered[:, :-1], dtype=np.int64), axis=1)
    ranks = np.empty_like(steps)
    np.put_along_axis(ranks, order, steps, axis=1)
    return ranks
