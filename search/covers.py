"""Layers that fused candidates hang together, as one group: every way to cover each of them exactly once.

A multiple-choice knapsack picks one cell per group. Layers that some candidate covers together, and those
tied to them, become one group whose cells are *covers*: disjoint candidates, and for every other layer its
own scheme. A cover that another one equals or beats in every number that anybody may ask for is dropped, on
the way already: what is added to both leaves them in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from search.core import Mask, undominated
from search.problem import SAFE_TOTAL
from sensitivity.table import Exact, ScoreTable

MOST_FUSINGS = 20_000
"""Sets of disjoint candidates of one group."""
MOST_COMBINED = 2**16
"""Covers of one group that are looked at together."""
MOST_COVERS = 2**12
"""Covers of one group that are left."""
BATCH = 2**13

Members = tuple[int, ...]
"""Layer indices of a table, rising."""


class CoverError(ValueError):
    """More covers than can be looked at."""


@dataclass(frozen=True)
class Quantity:
    """Something that a plan adds up. Scores and errors are of a metric; `layers` restricts a resource."""

    kind: Literal["score", "error", "resource"]
    name: str
    layers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Cover:
    """One way to cover a group: the table's column of each of its layers, in their order, and the fused
    candidates (indices) that cover some of them.
    """

    columns: tuple[int, ...]
    fused: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Covers:
    """The covers of one group with their totals (None: no number), and the least and the most that any cover
    has, those that were dropped among them.
    """

    options: tuple[Cover, ...]
    totals: Mapping[Quantity, tuple[Exact | None, ...]]
    ranges: Mapping[Quantity, tuple[Exact, Exact] | None]
    index: Mapping[Cover, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {cover: i for i, cover in enumerate(self.options)})


@dataclass(frozen=True, eq=False)
class Part:
    """Layers that hang together: tied `members`, and the candidates that may be used among them.

    `own` (layers, schemes) are the cells that layers may have alone. `wanted` says of each quantity whether
    less is better (1), more (-1), or one never stands for the other (0).
    """

    table: ScoreTable
    members: tuple[Members, ...]
    candidates: tuple[int, ...]
    own: Mask
    wanted: Mapping[Quantity, int]

    @cached_property
    def layers(self) -> Members:
        """All layers."""
        return tuple(sorted(layer for member in self.members for layer in member))

    def covers(self) -> Covers:
        """All covers that no other one equals or beats. Raises CoverError where there are too many."""
        return _Enumeration(self).covers()

    def fusings(self) -> Iterator[_Fusing]:
        """The sets of disjoint candidates, none first, that leave every other layer a scheme."""
        member_of = {layer: i for i, member in enumerate(self.members) for layer in member}
        cells = [self.table.fused_cells(self.table.fused[index]) for index in self.candidates]
        seen = 0

        def extend(
            start: int, taken: Members, covered: frozenset[int], forced: dict[int, int]
        ) -> Iterator[_Fusing]:
            nonlocal seen
            seen += 1
            self.refuse_more(seen, MOST_FUSINGS, "sets of fused candidates")
            fusing = self._fusing(taken, covered, forced)
            if fusing is not None:
                yield fusing
            for i in range(start, len(cells)):
                layers, column = frozenset(layer for layer, _ in cells[i]), cells[i][0][1]
                touched = dict.fromkeys((member_of[layer] for layer in layers), column)
                if not layers & covered and all(forced.get(m, column) == column for m in touched):
                    yield from extend(i + 1, (*taken, self.candidates[i]), covered | layers, forced | touched)

        yield from extend(0, (), frozenset(), {})

    def menu(self, member: int) -> list[int]:
        """The columns that a tied member may have if no candidate covers any of it."""
        return [int(column) for column in np.flatnonzero(self.own[list(self.members[member])].all(axis=0))]

    def refuse_more(self, count: int, most: int, what: str) -> None:
        """Raises CoverError for more than `most`."""
        if count > most:
            names = [self.table.layer_names[layer] for layer in self.layers]
            shown = names if len(names) < 6 else [*names[:4], f"{len(names) - 4} others"]
            raise CoverError(
                f"Layers that fused candidates hang together must have at most {most:,} {what}. Got more for "
                f"{len(names)} layers: {', '.join(shown)}. Keep fewer "
                "candidates or schemes (--forbid), tie layers, or leave out metrics and resources that are "
                "not asked for."
            )

    def _fusing(self, taken: Members, covered: frozenset[int], forced: Mapping[int, int]) -> _Fusing | None:
        """A set of candidates with the own cells that it leaves; None where a layer has no cell then."""
        alone = [
            (layer, column)
            for m, column in forced.items()
            for layer in self.members[m]
            if layer not in covered
        ]
        free = tuple(m for m in range(len(self.members)) if m not in forced)
        if not all(self.own[cell] for cell in alone) or not all(self.menu(m) for m in free):
            return None
        return _Fusing(taken, tuple(alone), tuple(forced.items()), free)


@dataclass(frozen=True)
class _Fusing:
    """Candidates, the own cells of layers tied to theirs, the columns of all these members, and the members
    that are free.
    """

    taken: Members
    alone: tuple[tuple[int, int], ...]
    forced: tuple[tuple[int, int], ...]
    free: Members


@dataclass(frozen=True, eq=False)
class _Pool:
    """Covers of some members: a column per member (-1: not among them), integer totals, and where a total is
    missing, shapes (covers, members), (covers, quantities) twice; and the fusing of each.
    """

    columns: NDArray[np.int64]
    totals: NDArray[Any]
    missing: Mask
    fusing: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.columns)

    def picked(self, rows: NDArray[np.int64]) -> _Pool:
        return _Pool(self.columns[rows], self.totals[rows], self.missing[rows], self.fusing[rows])

    def beside(self, other: _Pool) -> _Pool:
        pairs = (
            (self.columns, other.columns),
            (self.totals, other.totals),
            (self.missing, other.missing),
            (self.fusing, other.fusing),
        )
        return _Pool(*(np.concatenate(pair) for pair in pairs))

    def times(self, other: _Pool) -> _Pool:
        """Every cover of these with every one of the others, which have other members."""
        mine, theirs = (grid.ravel() for grid in np.mgrid[: len(self), : len(other)])
        return _Pool(
            np.maximum(self.columns[mine], other.columns[theirs]),
            self.totals[mine] + other.totals[theirs],
            self.missing[mine] | other.missing[theirs],
            np.maximum(self.fusing[mine], other.fusing[theirs]),
        )


class _Enumeration:
    """One part's numbers as integers, the covers of its free members, and all of its covers."""

    def __init__(self, part: Part) -> None:
        self._part, self._quantities = part, tuple(part.wanted)
        own = [(layer, int(column)) for layer in part.layers for column in np.flatnonzero(part.own[layer])]
        self._row = {cell: i for i, cell in enumerate(own)}
        self._row_of_candidate = {index: len(own) + i for i, index in enumerate(part.candidates)}
        self._scales: list[int] = []
        columns = [self._integers(quantity, own) for quantity in self._quantities]
        self._numbers = np.array([numbers for numbers, _ in columns], dtype=object).T
        self._missing = np.array([missing for _, missing in columns], dtype=bool).T
        self._singles = [self._single(member) for member in range(len(part.members))]
        self._products: dict[Members, _Pool] = {}

    def _integers(self, quantity: Quantity, own: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """A quantity of all own cells, then of all candidates; and where there is none."""
        table = self._part.table
        values = [cell_amount(table, quantity, *cell) for cell in own]
        values += [fused_amount(table, quantity, index) for index in self._part.candidates]
        known = [value or 0 for value in values]
        scale = math.lcm(*(value.denominator for value in known))
        self._scales.append(scale)
        return [value.numerator * (scale // value.denominator) for value in known], [
            v is None for v in values
        ]

    def covers(self) -> Covers:
        """See `Part.covers`."""
        fusings = list(self._part.fusings())
        found, ranges = self._pool([]), [_Range() for _ in self._quantities]
        pending = found
        for index, fusing in enumerate(fusings):
            rows = [self._row[cell] for cell in fusing.alone]
            rows += [self._row_of_candidate[one] for one in fusing.taken]
            start = self._pool([(rows, dict(fusing.forced))], index)
            parts = [start, *(self._singles[member] for member in fusing.free)]
            for position, one in enumerate(ranges):
                one.take([(part.totals[:, position], part.missing[:, position]) for part in parts])
            pending = pending.beside(start.times(self._product(fusing.free)))
            if len(pending) > BATCH:
                found, pending = self._fewer(found.beside(pending)), self._pool([])
        found = self._fewer(found.beside(pending))
        return Covers(
            tuple(
                self._cover(columns, fusings[index])
                for columns, index in zip(found.columns.tolist(), found.fusing.tolist(), strict=True)
            ),
            {
                quantity: tuple(
                    None if missing else Fraction(total, scale)
                    for total, missing in zip(found.totals[:, i], found.missing[:, i], strict=True)
                )
                for i, (quantity, scale) in enumerate(zip(self._quantities, self._scales, strict=True))
            },
            {
                quantity: one.of(scale)
                for quantity, one, scale in zip(self._quantities, ranges, self._scales, strict=True)
            },
        )

    def _cover(self, columns: Sequence[int], fusing: _Fusing) -> Cover:
        column_of = {
            layer: column
            for member, column in zip(self._part.members, columns, strict=True)
            for layer in member
        }
        return Cover(tuple(column_of[layer] for layer in self._part.layers), fusing.taken)

    def _pool(self, covers: Sequence[tuple[list[int], Mapping[int, int]]], fusing: int = -1) -> _Pool:
        """Covers, each by its rows of numbers and the columns of its members."""
        members, quantities = len(self._part.members), len(self._quantities)
        columns = np.array(
            [[chosen.get(m, -1) for m in range(members)] for _, chosen in covers], dtype=np.int64
        ).reshape(len(covers), members)
        totals = np.zeros((len(covers), quantities), dtype=object)
        missing = np.zeros((len(covers), quantities), dtype=bool)
        for i, (rows, _) in enumerate(covers):
            totals[i] = self._numbers[rows].sum(axis=0) if rows else 0
            missing[i] = self._missing[rows].any(axis=0)
        return _Pool(columns, totals, missing, np.full(len(covers), fusing))

    def _single(self, member: int) -> _Pool:
        """The covers of one free member, a scheme each."""
        layers = self._part.members[member]
        menu = self._part.menu(member)
        return self._pool([([self._row[layer, c] for layer in layers], {member: c}) for c in menu])

    def _product(self, free: Members) -> _Pool:
        """The covers of some free members."""
        if free not in self._products:
            if not free:
                self._products[free] = self._pool([([], {})])
            else:
                rest, last = self._product(free[:-1]), self._singles[free[-1]]
                self._part.refuse_more(len(rest) * len(last), MOST_COMBINED, "combined choices at a time")
                self._products[free] = self._kept(rest.times(last))
        return self._products[free]

    def _fewer(self, pool: _Pool) -> _Pool:
        kept = self._kept(pool, MOST_COVERS)
        self._part.refuse_more(len(kept), MOST_COVERS, "combined choices that no other one beats")
        return kept

    def _kept(self, pool: _Pool, most: float = math.inf) -> _Pool:
        """Without covers that another one equals or beats."""
        ranks: dict[bytes, NDArray[np.int64]] = {}
        for position, wanted in enumerate(self._part.wanted.values()):
            rank = _rank(pool.totals[:, position])
            for sign in (1, -1) if wanted == 0 else (wanted,):
                signed = np.where(pool.missing[:, position], len(pool), sign * rank)
                ranks[signed.tobytes()] = signed
        return pool.picked(undominated(np.stack(list(ranks.values()), axis=1), most))


def _rank(values: NDArray[Any]) -> NDArray[np.int64]:
    """The place of each integer among the distinct ones."""
    small = max(map(abs, values.tolist()), default=0) < SAFE_TOTAL
    _, rank = np.unique(values.astype(np.int64) if small else values, return_inverse=True)
    return np.asarray(rank, dtype=np.int64)


class _Range:
    """The least and the most total of a quantity among all covers that have one."""

    def __init__(self) -> None:
        self._found: tuple[int, int] | None = None

    def take(self, parts: Sequence[tuple[NDArray[Any], Mask]]) -> None:
        """Covers that pick one of each part."""
        known = [totals[~missing] for totals, missing in parts]
        if not all(map(len, known)):
            return
        low, high = sum(int(part.min()) for part in known), sum(int(part.max()) for part in known)
        if self._found is not None:
            low, high = min(low, self._found[0]), max(high, self._found[1])
        self._found = low, high

    def of(self, scale: int) -> tuple[Exact, Exact] | None:
        """In the quantity's unit."""
        return (
            None
            if self._found is None
            else (Fraction(self._found[0], scale), Fraction(self._found[1], scale))
        )


def cell_amount(table: ScoreTable, quantity: Quantity, layer: int, column: int) -> Exact | None:
    """What one layer adds to a quantity by a scheme of its own; None where it has no number."""
    if quantity.kind == "resource":
        taken = not quantity.layers or table.layer_names[layer] in quantity.layers
        return table.resources[quantity.name][layer][column] if taken else 0
    metric = table.metrics[quantity.name]
    values = metric.values if quantity.kind == "score" else metric.stderr
    value = math.nan if values is None else float(values[layer, column])
    return None if math.isnan(value) else Fraction(value)


def fused_amount(table: ScoreTable, quantity: Quantity, index: int) -> Exact | None:
    """What a fused candidate adds to a quantity; None where it has no number."""
    fused = table.fused[index]
    if quantity.kind == "resource":
        return table.fused_usage(fused, quantity.name, quantity.layers)
    amount = table.fused_score if quantity.kind == "score" else table.fused_error
    return amount(fused, quantity.name)
