"""From a score table and limits to a problem, and from a solution back to layers and schemes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.budget import BITS_PER_WEIGHT, BudgetError, Limit
from search.problem import Choice, IntMatrix, Problem, Row
from sensitivity.table import Exact, ExactMatrix, MetricTable, ScoreTable, TableLayer, whole_numbers

Assignment = dict[str, str]
"""Layer name -> scheme name."""


class CompileError(ValueError):
    """A request that names something the table does not have."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A problem and the way back. `groups` holds the table's layer indices of every group of the problem."""

    table: ScoreTable
    metric: str
    limits: tuple[Limit, ...]
    problem: Problem
    groups: tuple[tuple[int, ...], ...]

    def assignment(self, choice: Sequence[int]) -> Assignment:
        """Layer -> scheme of a choice, in table order."""
        scheme_of = {layer: choice[group] for group, layers in enumerate(self.groups) for layer in layers}
        return {layer.name: self.table.schemes[scheme_of[i]] for i, layer in enumerate(self.table.layers)}

    def choice(self, assignment: Mapping[str, str]) -> Choice:
        """Inverse of `assignment`. Raises CompileError if a layer is missing or a tie is broken."""
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

    def objective(self, assignment: Mapping[str, str]) -> float:
        """The metric summed over the table's layers, correctly rounded."""
        column = {name: i for i, name in enumerate(self.table.schemes)}
        values = self.table.metrics[self.metric].values
        return math.fsum(
            float(values[i, column[assignment[layer.name]]]) for i, layer in enumerate(self.table.layers)
        )

    def resources(self, assignment: Mapping[str, str]) -> dict[str, Fraction]:
        """Exact totals of every resource, and `bits_per_weight` where there are bytes."""
        column = {name: i for i, name in enumerate(self.table.schemes)}
        chosen = [column[assignment[layer.name]] for layer in self.table.layers]
        exact = {name: self.table.whole(name) for name in self.table.resources}
        rows = np.arange(len(chosen))
        totals = {name: int(whole[rows, chosen].sum()) * unit for name, (whole, unit) in exact.items()}
        used = {layer.name: i for i, layer in enumerate(self.table.layers)}
        for name, maximum in self.table.maxima.items():
            cells = self.table.resources[maximum.resource]
            sums = [
                sum((Fraction(cells[used[m]][chosen[used[m]]] or 0) for m in cut), Fraction(0))
                for cut in maximum.cuts
            ]
            totals[name] = max(sums)
        if "bytes" in totals:
            totals[BITS_PER_WEIGHT] = 8 * totals["bytes"] / self.table.parameters
        return totals


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
    limits = tuple(part for limit in limits for part in _over_cuts(table, limit))
    allowed = _allowed(table, name, forbidden or {})
    for limit in limits:
        if limit.resource not in table.resources and limit.resource in table.metrics:
            allowed &= table.offered(limit.resource)
    offered = _restricted(table, allowed, pins or {}, schemes)
    groups = _groups(table, ties)
    group_offered = np.array([offered[list(layers)].all(axis=0) for layers in groups])
    costs = np.array([_group_costs(table.metrics[name], layers) for layers in groups])
    costs[~group_offered] = np.nan
    limits = tuple(_absolute(table, limit) for limit in limits)
    rows = tuple(_row(table, limit, groups, group_offered) for limit in _tightest(limits))
    problem = Problem(
        costs,
        rows,
        table.metrics[name].direction,
        tuple("+".join(table.layers[layer].name for layer in layers) for layers in groups),
        table.schemes,
    )
    return Compiled(table, name, tuple(limits), problem, groups)


def resource_row(compiled: Compiled, limit: Limit) -> Row:
    """A limit as a row over the groups of a compiled problem. Raises BudgetError for an unknown resource."""
    return _row(compiled.table, limit, compiled.groups, compiled.problem.offered)


def exact_number(value: Fraction) -> int | float:
    """An exact total for JSON: an integer where it is one, else the nearest float."""
    return value.numerator if value.denominator == 1 else float(value)


def close_names(wanted: str, names: Iterable[str]) -> str:
    """The names most like the wanted one, for an error message."""
    known = list(names)
    close = difflib.get_close_matches(wanted, known[:20_000], n=3, cutoff=0.5)
    shown = close or known[:5]
    more = "" if close or len(known) <= 5 else f" and {len(known) - 5} more"
    return f"{'Close names' if close else 'Known names'}: {', '.join(shown)}{more}."


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


def _allowed(table: ScoreTable, metric: str, forbidden: Mapping[str, Collection[str]]) -> NDArray[np.bool_]:
    offered = table.offered(metric).copy()
    for layer, names in forbidden.items():
        row = _index(layer, table.layer_names, "layer with forbidden schemes")
        offered[row, [column for column, scheme in enumerate(table.schemes) if scheme in names]] = False
    return offered


def _restricted(
    table: ScoreTable, offered: NDArray[np.bool_], pins: Mapping[str, str], schemes: Collection[str] | None
) -> NDArray[np.bool_]:
    allowed = offered.copy()
    if schemes is not None:
        columns = [_index(scheme, table.schemes, "scheme") for scheme in schemes]
        allowed[:, [c for c in range(len(table.schemes)) if c not in columns]] = False
    for layer, scheme in pins.items():
        row, column = (
            _index(layer, table.layer_names, "pinned layer"),
            _index(scheme, table.schemes, "scheme"),
        )
        if not offered[row, column]:
            known = [name for name, has in zip(table.schemes, offered[row], strict=True) if has]
            raise CompileError(
                f"The scheme pinned for {layer} must be offered there. Got {scheme}. "
                f"Offered: {', '.join(known)}."
            )
        kept = offered[row, column]
        allowed[row] = False
        allowed[row, column] = kept
    return allowed


def _groups(table: ScoreTable, ties: Iterable[Collection[str]]) -> tuple[tuple[int, ...], ...]:
    """Layer indices that share one decision: union-find over `group` and ties, by first appearance."""
    parent = list(range(len(table.layers)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, layer in enumerate(table.layers):
        if layer.group is not None:
            parent[root(i)] = root(first.setdefault(layer.group, i))
    for tie in ties:
        if len(set(tie)) < 2:
            raise CompileError(f"A tie must name at least two layers. Got {', '.join(tie) or 'none'}.")
        members = [_index(name, table.layer_names, "tied layer") for name in tie]
        for member in members[1:]:
            parent[root(member)] = root(members[0])
    groups: dict[int, list[int]] = {}
    for i in range(len(table.layers)):
        groups.setdefault(root(i), []).append(i)
    return tuple(sorted((tuple(members) for members in groups.values()), key=lambda members: members[0]))


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
    inside, rows = _inside(table, limit), _amounts(table, limit.resource)
    cells = [
        _uniform_cell(table, row, column, layer) if taken else 0
        for row, layer, taken in zip(rows, table.layers, inside, strict=True)
    ]
    if None in cells:
        layer = table.layer_names[cells.index(None)]
        raise CompileError(
            "The scheme of a uniform limit must be offered for every layer. "
            f"Got {limit.uniform}, which {layer} does not offer. Write the limit as a number."
        )
    total = sum((Fraction(cell) for cell in cells if cell is not None), Fraction(0))
    value = 8 * total / _parameters(table, limit) if limit.resource == BITS_PER_WEIGHT else total
    return replace(limit, value=value, uniform="")


def _over_cuts(table: ScoreTable, limit: Limit) -> tuple[Limit, ...]:
    """A limit on a maximum as one limit per cut; any other one as it is."""
    maximum = table.maxima.get(limit.resource)
    if maximum is None:
        return (limit,)
    if limit.relation != "<=" or limit.of_range or limit.uniform or limit.layers:
        raise BudgetError(
            f"A limit on a maximum must be the most that it may be: {limit.resource}<=AMOUNT. Got {limit}."
        )
    return tuple(
        replace(limit, resource=maximum.resource, scope=f"{limit.resource} {i}", layers=frozenset(cut))
        for i, cut in enumerate(maximum.cuts)
    )


def _inside(table: ScoreTable, limit: Limit) -> list[bool]:
    """Which layers a limit is about."""
    return [not limit.layers or name in limit.layers for name in table.layer_names]


def _parameters(table: ScoreTable, limit: Limit) -> int:
    inside = _inside(table, limit)
    return sum(layer.parameters for layer, taken in zip(table.layers, inside, strict=True) if taken)


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


def _amounts(table: ScoreTable, resource: str) -> ExactMatrix:
    """What a limit adds up: a resource of the table (bits per weight are counted in bytes), or a metric."""
    source = "bytes" if resource == BITS_PER_WEIGHT else resource
    if source in table.resources:
        return table.resources[source]
    if source in table.metrics:
        values = table.metrics[source].values.tolist()
        return tuple(tuple(None if math.isnan(value) else Fraction(value) for value in row) for row in values)
    names = (*table.resources, *table.metrics)
    known = close_names(resource, names) if table.resources else "The table has no resources."
    raise BudgetError(f"A limit must be on a resource or metric of the table. Got {resource!r}. {known}")


def _tightest(limits: Iterable[Limit]) -> list[Limit]:
    """Limits without repeats: of several absolute ones on a resource and side, the tightest."""
    kept: dict[tuple[Any, ...], Limit] = {}
    for limit in limits:
        key = (limit.resource, limit.relation, limit.of_range, limit.layers)
        side = min if limit.relation == "<=" else max
        kept[key] = side(kept.get(key, limit), limit, key=lambda item: item.value)
    return list(kept.values())


def _row(
    table: ScoreTable, limit: Limit, groups: tuple[tuple[int, ...], ...], offered: NDArray[np.bool_]
) -> Row:
    usage, unit = _usage(table, limit, groups)
    usage = np.where(offered, usage, 0)
    value = _ranged(limit, usage, offered) if limit.of_range else limit.value / unit
    whole = math.floor(value) if limit.relation == "<=" else math.ceil(value)
    return Row(limit.name, limit.relation, usage, whole, unit)


def _usage(
    table: ScoreTable, limit: Limit, groups: tuple[tuple[int, ...], ...]
) -> tuple[IntMatrix, Fraction]:
    """Integers per (group, scheme) and the resource one integer stands for; 0 for layers out of the scope."""
    source = "bytes" if limit.resource == BITS_PER_WEIGHT else limit.resource
    known = source in table.resources
    whole, unit = table.whole(source) if known else whole_numbers(_amounts(table, limit.resource))
    counted = np.where(np.array(_inside(table, limit))[:, None], whole, 0)
    if len(groups) == len(table.layers):
        usage = counted[[layers[0] for layers in groups]]
    else:
        usage = np.array([counted[list(layers)].sum(axis=0) for layers in groups])
    per_weight = limit.resource == BITS_PER_WEIGHT
    return usage, unit * 8 / _parameters(table, limit) if per_weight else unit


def _ranged(limit: Limit, usage: IntMatrix, offered: NDArray[np.bool_]) -> Fraction:
    open_groups = offered.any(axis=1)
    pairs = [(row[mask], mask) for row, mask in zip(usage[open_groups], offered[open_groups], strict=True)]
    low = sum(int(row.min()) for row, _ in pairs)
    high = sum(int(row.max()) for row, _ in pairs)
    return low + limit.value * (high - low)


def _index(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise CompileError(f"A {what} must be in the table. Got {name!r}. {close_names(name, names)}")
    return names.index(name)
