"""From a score table and limits to a problem, and from a solution back to layers and schemes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.budget import BITS_PER_WEIGHT, Limit, close_names
from search.core import exact_sum
from search.covers import Cover, CoverError, Covers, Part, Quantity
from search.problem import Choice, Problem, Row
from search.rows import (
    amounts_of,
    inside_of,
    over_cuts,
    parameters_of,
    quantity_of,
    row_of,
    tightest,
    wanted_sides,
)
from sensitivity.table import Exact, Fused, MetricTable, ScoreTable, TableLayer

MOST_CELLS = 2**23
"""Groups times cells of a problem with fused candidates."""

Assignment = dict[str, str]
"""Layer name -> scheme name."""


class CompileError(ValueError):
    """A request that names something the table does not have."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A problem and the way back. `groups` holds the table's layer indices of every group of the problem.

    A group's cells are the table's schemes, but for groups of `covers`, which fused candidates hang together:
    there they are the ways to cover its layers.
    """

    table: ScoreTable
    metric: str
    limits: tuple[Limit, ...]
    problem: Problem
    groups: tuple[tuple[int, ...], ...]
    covers: Mapping[int, Covers] = field(default_factory=dict)

    def cover(self, group: int, cell: int) -> Cover:
        """What a cell of the problem means."""
        if group in self.covers:
            return self.covers[group].options[cell]
        return Cover((cell,) * len(self.groups[group]))

    def assignment(self, choice: Sequence[int]) -> Assignment:
        """Layer -> scheme of a choice, in table order."""
        scheme_of = {
            layer: column
            for group, layers in enumerate(self.groups)
            for layer, column in zip(layers, self.cover(group, choice[group]).columns, strict=True)
        }
        return {layer.name: self.table.schemes[scheme_of[i]] for i, layer in enumerate(self.table.layers)}

    def fused(self, choice: Sequence[int]) -> tuple[Fused, ...]:
        """The fused candidates of a choice, in table order; all other layers have cells of their own."""
        used = [index for group in self.covers for index in self.cover(group, choice[group]).fused]
        return tuple(self.table.fused[index] for index in sorted(used))

    def label(self, group: int, cell: int) -> str:
        """A cell for people: a scheme, or `q=w4, k+v=w8 fused` where layers of a group differ."""
        cover, names = (
            self.cover(group, cell),
            [self.table.layers[layer].name for layer in self.groups[group]],
        )
        if not cover.fused and len(set(cover.columns)) == 1:
            return self.table.schemes[cover.columns[0]]
        fused = [self.table.fused[index] for index in cover.fused]
        covered = {name for one in fused for name in one.layers}
        alone = [
            f"{name}={self.table.schemes[column]}"
            for name, column in zip(names, cover.columns, strict=True)
            if name not in covered
        ]
        if len(fused) == 1 and not alone:
            return f"{fused[0].scheme} fused"
        return ", ".join([*alone, *(f"{'+'.join(one.layers)}={one.scheme} fused" for one in fused)])

    def used(self, resource: str, group: int, cell: int) -> Fraction:
        """What a cell uses of a resource of the table, exact."""
        if group in self.covers:
            return Fraction(self.covers[group].totals[Quantity("resource", resource)][cell] or 0)
        rows = self.table.resources[resource]
        return sum((Fraction(rows[layer][cell] or 0) for layer in self.groups[group]), Fraction(0))

    def refuse_fused(self, what: str) -> None:
        """Raises CompileError where the problem has fused candidates."""
        if self.covers:
            raise CompileError(
                f"{what} must have a table without fused candidates. Got {len(self.table.fused)}. "
                "Leave `fused` out of the table, or forbid their schemes."
            )

    def choice(self, assignment: Mapping[str, str]) -> Choice:
        """Inverse of `assignment` where nothing is fused. Raises CompileError if a layer is missing or a tie
        is broken.
        """
        self.refuse_fused("A plan by its schemes alone")
        column = {name: i for i, name in enumerate(self.table.schemes)}
        chosen = []
        for layers in self.groups:
            names = [self.table.layers[layer].name for layer in layers]
            schemes = {assignment.get(name) for name in names}
            if len(schemes) != 1 or next(iter(schemes)) not in column:
                raise CompileError(
                    "Tied layers must all have one scheme of the table. "
                    f"Got {', '.join(sorted(map(str, schemes)))} for {', '.join(names)}."
                )
            chosen.append(column[str(schemes.pop())])
        return tuple(chosen)

    def objective(self, assignment: Mapping[str, str], fused: Collection[Fused] = ()) -> float:
        """The metric summed over the table's layers and `fused` candidates in place of theirs, correctly
        rounded.
        """
        values = self.table.metrics[self.metric].values
        own = [float(values[cell]) for cell in self._own(assignment, fused).values()]
        scores = [self.table.fused_score(one, self.metric) or 0 for one in fused]
        return float(exact_sum(np.array(own)) + sum(scores)) if fused else math.fsum(own)

    def resources(self, assignment: Mapping[str, str], fused: Collection[Fused] = ()) -> dict[str, Fraction]:
        """Exact totals of every resource, summed anew, and `bits_per_weight` where there are bytes."""
        own = self._own(assignment, fused)
        totals = {name: self._used(name, own.values(), fused) for name in self.table.resources}
        for name, maximum in self.table.maxima.items():
            totals[name] = max(
                self._used(maximum.resource, [own[layer] for layer in cut if layer in own], fused, cut)
                for cut in maximum.cuts
            )
        if "bytes" in totals:
            totals[BITS_PER_WEIGHT] = 8 * totals["bytes"] / self.table.parameters
        return totals

    def _own(self, assignment: Mapping[str, str], fused: Collection[Fused]) -> dict[str, tuple[int, int]]:
        """The cells of layers that no fused candidate covers."""
        covered = {name for one in fused for name in one.layers}
        column = {name: i for i, name in enumerate(self.table.schemes)}
        return {
            name: (row, column[assignment[name]])
            for row, name in enumerate(self.table.layer_names)
            if name not in covered
        }

    def _used(
        self,
        resource: str,
        own: Iterable[tuple[int, int]],
        fused: Collection[Fused],
        layers: Collection[str] = (),
    ) -> Fraction:
        whole, unit = self.table.whole(resource)
        rows, columns = np.array(list(own), dtype=np.int64).reshape(-1, 2).T
        parts = [self.table.fused_usage(one, resource, layers) for one in fused]
        return sum((Fraction(part or 0) for part in parts), int(whole[rows, columns].sum()) * unit)


def compile_problem(
    table: ScoreTable,
    *,
    metric: str | None = None,
    limits: Iterable[Limit] = (),
    ties: Iterable[Collection[str]] = (),
    pins: Mapping[str, str] | None = None,
    schemes: Collection[str] | None = None,
    forbidden: Mapping[str, Collection[str]] | None = None,
) -> Compiled:
    """Builds the problem. Layers of one `group` or tie become one row; pins and `schemes` restrict the menu.
    A limit may be on a metric: its scores are exact numbers too.

    `forbidden` names schemes that single layers must not get, pinned or not.

    Ties and pins that leave a group without any scheme give a problem that is infeasible, not an error.
    Raises CompileError for unknown metrics, layers, schemes and resources, and for a pin to a scheme that
    is not offered.
    """
    name = _metric_name(table, metric)
    limits = tuple(part for limit in limits for part in over_cuts(table, limit))
    limited = [
        limit.resource
        for limit in limits
        if limit.resource not in table.resources and limit.resource in table.metrics
    ]
    offered = np.logical_and.reduce([table.offered(metric) for metric in (name, *limited)])
    candidates = [
        index
        for index, one in enumerate(table.fused)
        if all(table.fused_offered(one, metric) for metric in (name, *limited))
    ]
    permitted = _permitted(table, offered, candidates, pins or {}, schemes, forbidden or {})
    candidates = [i for i in candidates if all(permitted[cell] for cell in table.fused_cells(table.fused[i]))]
    limits = tuple(_absolute(table, limit) for limit in limits)
    groups, covers = _covered(table, _groups(table, ties), candidates, offered & permitted, name, limits)
    costs = _costs(table, name, groups, covers, offered & permitted)
    group_offered = ~np.isnan(costs)
    rows = tuple(row_of(table, limit, groups, covers, group_offered) for limit in tightest(limits))
    more = tuple(f"choice {cell}" for cell in range(len(table.schemes), costs.shape[1]))
    problem = Problem(
        costs,
        rows,
        table.metrics[name].direction,
        tuple("+".join(table.layers[layer].name for layer in layers) for layers in groups),
        (*table.schemes, *more),
    )
    return Compiled(table, name, tuple(limits), problem, groups, covers)


def resource_row(compiled: Compiled, limit: Limit) -> Row:
    """A limit as a row over the groups of a compiled problem. Raises BudgetError for an unknown resource."""
    return row_of(compiled.table, limit, compiled.groups, compiled.covers, compiled.problem.offered)


def exact_number(value: Fraction) -> int | float:
    """An exact total for JSON: an integer where it is one, else the nearest float."""
    return value.numerator if value.denominator == 1 else float(value)


def _metric_name(table: ScoreTable, metric: str | None) -> str:
    if metric is None and len(table.metrics) == 1:
        return next(iter(table.metrics))
    if metric is None:
        raise CompileError(
            "The metric must be named when the table has several. Got none. "
            f"Known names: {', '.join(table.metrics)}."
        )
    if metric not in table.metrics:
        raise CompileError(
            f"The metric must be in the table. Got {metric!r}. {close_names(metric, table.metrics)}"
        )
    return metric


def _permitted(
    table: ScoreTable,
    offered: NDArray[np.bool_],
    candidates: Sequence[int],
    pins: Mapping[str, str],
    schemes: Collection[str] | None,
    forbidden: Mapping[str, Collection[str]],
) -> NDArray[np.bool_]:
    """Shape (layers, schemes): what the menu, pins and forbidden schemes leave, alone or fused."""
    free, known = np.ones(offered.shape, dtype=bool), offered.copy()
    for index in candidates:
        for cell in table.fused_cells(table.fused[index]):
            known[cell] = True
    for layer, names in forbidden.items():
        row = _index(layer, table.layer_names, "layer with forbidden schemes")
        free[row, [column for column, scheme in enumerate(table.schemes) if scheme in names]] = False
    allowed = free.copy()
    if schemes is not None:
        columns = [_index(scheme, table.schemes, "scheme") for scheme in schemes]
        allowed[:, [c for c in range(len(table.schemes)) if c not in columns]] = False
    for layer, scheme in pins.items():
        row, column = (
            _index(layer, table.layer_names, "pinned layer"),
            _index(scheme, table.schemes, "scheme"),
        )
        possible = known[row] & free[row]
        if not possible[column]:
            names = [name for name, has in zip(table.schemes, possible, strict=True) if has]
            raise CompileError(
                f"The scheme pinned for {layer} must be offered there. Got {scheme}. "
                f"Offered: {', '.join(names)}."
            )
        allowed[row] = False
        allowed[row, column] = True
    return allowed


def _groups(table: ScoreTable, ties: Iterable[Collection[str]]) -> tuple[tuple[int, ...], ...]:
    """Layer indices that share one decision, by `group` and ties."""
    named: dict[str, list[int]] = {}
    for i, layer in enumerate(table.layers):
        if layer.group is not None:
            named.setdefault(layer.group, []).append(i)
    sets = list(named.values())
    for tie in ties:
        if len(set(tie)) < 2:
            raise CompileError(f"A tie must name at least two layers. Got {', '.join(tie) or 'none'}.")
        sets.append([_index(name, table.layer_names, "tied layer") for name in tie])
    return _joined(len(table.layers), sets)


def _joined(count: int, sets: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The numbers below `count`, those of a set together: union-find, by first appearance."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for members in sets:
        for member in members[1:]:
            parent[root(member)] = root(members[0])
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(root(i), []).append(i)
    return tuple(sorted((tuple(members) for members in groups.values()), key=lambda members: members[0]))


def _covered(
    table: ScoreTable,
    ties: tuple[tuple[int, ...], ...],
    candidates: Sequence[int],
    own: NDArray[np.bool_],
    metric: str,
    limits: Iterable[Limit],
) -> tuple[tuple[tuple[int, ...], ...], dict[int, Covers]]:
    """The groups, tied ones joined where candidates cover layers of several, and the covers of these.

    Raises CompileError where there are too many.
    """
    if not candidates:
        return ties, {}
    fused = [[row for row, _ in table.fused_cells(table.fused[index])] for index in candidates]
    joined = _joined(len(table.layers), [*fused, *ties])
    tied = {layer: tie for tie in ties for layer in tie}
    part_of = {layer: layers for layers in joined for layer in layers}
    members: dict[tuple[int, ...], list[int]] = {}
    for index, rows in zip(candidates, fused, strict=True):
        members.setdefault(part_of[rows[0]], []).append(index)
    wanted, covers = wanted_sides(table, metric, limits), {}
    for group, layers in enumerate(joined):
        if layers in members:
            inside = tuple(dict.fromkeys(tied[layer] for layer in layers))
            part = Part(table, inside, tuple(members[layers]), own, wanted)
            try:
                covers[group] = part.covers()
            except CoverError as error:
                raise CompileError(str(error)) from None
    _refuse_wide(table, joined, covers)
    return joined, covers


def _refuse_wide(table: ScoreTable, groups: Sequence[Any], covers: Mapping[int, Covers]) -> None:
    widest = max(len(one.options) for one in covers.values())
    if widest > len(table.schemes) and widest * len(groups) > MOST_CELLS:
        raise CompileError(
            f"Groups times the combined choices of fused candidates must be at most {MOST_CELLS:,}. "
            f"Got {len(groups):,} x {widest:,}. Keep fewer candidates or schemes, or tie layers."
        )


def _costs(
    table: ScoreTable,
    metric: str,
    groups: tuple[tuple[int, ...], ...],
    covers: Mapping[int, Covers],
    offered: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Shape (groups, cells), NaN where there is no cell, or none that is offered."""
    width = max(len(table.schemes), *(len(one.options) for one in covers.values()), 1)
    own = np.array([_group_costs(table.metrics[metric], layers) for layers in groups])
    own[~np.array([offered[list(layers)].all(axis=0) for layers in groups])] = np.nan
    costs = np.full((len(groups), width), np.nan)
    costs[:, : own.shape[1]] = own
    for group, one in covers.items():
        scores = one.totals[Quantity("score", metric)]
        costs[group] = np.nan
        costs[group, : len(scores)] = [float(score) for score in scores if score is not None]
    return costs


def _group_costs(metric: MetricTable, layers: tuple[int, ...]) -> list[float]:
    if len(layers) == 1:
        return list(metric.values[layers[0]].tolist())
    columns = metric.values[list(layers)].T
    return [math.nan if np.isnan(column).any() else math.fsum(column) for column in columns]


def _absolute(table: ScoreTable, limit: Limit) -> Limit:
    """A limit "uniform SCHEME" with the number it stands for; any other one as it is."""
    if not limit.uniform:
        return limit
    column = _index(limit.uniform, table.schemes, "scheme of a uniform limit")
    rows = amounts_of(table, quantity_of(table, replace(limit, layers=frozenset())))
    cells = [
        _uniform_cell(table, row, column, layer) if taken else 0
        for row, layer, taken in zip(rows, table.layers, inside_of(table, limit), strict=True)
    ]
    if None in cells:
        layer = table.layer_names[cells.index(None)]
        raise CompileError(
            "The scheme of a uniform limit must be offered for every layer. "
            f"Got {limit.uniform}, which {layer} does not offer. Write the limit as a number."
        )
    total = sum((Fraction(cell) for cell in cells if cell is not None), Fraction(0))
    value = 8 * total / parameters_of(table, limit) if limit.resource == BITS_PER_WEIGHT else total
    return replace(limit, value=value, uniform="")


def _uniform_cell(
    table: ScoreTable, row: Sequence[Exact | None], column: int, layer: TableLayer
) -> Exact | None:
    """What a layer uses under a uniform scheme: where it does not offer that, what it uses under the one that
    it keeps, or nothing if it never uses any.
    """
    if row[column] is not None:
        return row[column]
    if layer.kept is not None:
        return row[table.schemes.index(layer.kept)]
    return 0 if not any(row) else None


def _index(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise CompileError(f"A {what} must be in the table. Got {name!r}. {close_names(name, names)}")
    return names.index(name)
