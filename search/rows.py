"""Limits as rows of a problem: what is added up, in exact integers over its groups and cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.budget import BITS_PER_WEIGHT, BudgetError, Limit, close_names
from search.covers import Covers, Quantity
from search.problem import IntMatrix, Row, integer_matrix
from sensitivity.table import Exact, ScoreTable


def over_cuts(table: ScoreTable, limit: Limit) -> tuple[Limit, ...]:
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


def tightest(limits: Iterable[Limit]) -> list[Limit]:
    """Limits without repeats: of several absolute ones on a resource and side, the tightest."""
    kept: dict[tuple[Any, ...], Limit] = {}
    for limit in limits:
        key = (limit.resource, limit.relation, limit.of_range, limit.layers)
        side = min if limit.relation == "<=" else max
        kept[key] = side(kept.get(key, limit), limit, key=lambda item: item.value)
    return list(kept.values())


def wanted_sides(table: ScoreTable, deciding: str, limits: Iterable[Limit]) -> dict[Quantity, int]:
    """All that may be asked of a plan: 1 where less of it is better, -1 where more is, 0 where both may be.

    Metrics and resources that no limit is on count too: objectives, frontiers and explanations ask for them.
    """
    sides: dict[Quantity, set[int]] = {}
    for name, metric in table.metrics.items():
        more = {-1} if name == deciding else {-1, 1}
        sides[Quantity("score", name)] = {1} if metric.direction == "min" else more
        if metric.stderr is not None:
            sides[Quantity("error", name)] = {1}
    sides |= {Quantity("resource", name): {1} for name in table.resources}
    for limit in limits:
        side = 1 if limit.relation == "<=" else -1
        sides.setdefault(quantity_of(table, limit), set()).add(side)
    return {quantity: side.pop() if len(side) == 1 else 0 for quantity, side in sides.items()}


def quantity_of(table: ScoreTable, limit: Limit) -> Quantity:
    """What a limit adds up: a resource of the table (bits per weight are counted in bytes), or a metric."""
    source = "bytes" if limit.resource == BITS_PER_WEIGHT else limit.resource
    if source in table.resources:
        return Quantity("resource", source, limit.layers)
    if source in table.metrics:
        return Quantity("score", source)
    names = (*table.resources, *table.metrics)
    known = close_names(limit.resource, names) if table.resources else "The table has no resources."
    raise BudgetError(
        f"A limit must be on a resource or metric of the table. Got {limit.resource!r}. {known}"
    )


def amounts_of(table: ScoreTable, quantity: Quantity) -> Sequence[Sequence[Exact | None]]:
    """A quantity of every cell of the table."""
    if quantity.kind == "score":
        values = table.metrics[quantity.name].values.tolist()
        return [[None if math.isnan(value) else Fraction(value) for value in row] for row in values]
    rows, nothing = table.resources[quantity.name], (0,) * len(table.schemes)
    if not quantity.layers:
        return rows
    pairs = zip(table.layer_names, rows, strict=True)
    return [row if name in quantity.layers else nothing for name, row in pairs]


def inside_of(table: ScoreTable, limit: Limit) -> list[bool]:
    """Which layers a limit is about."""
    return [not limit.layers or name in limit.layers for name in table.layer_names]


def parameters_of(table: ScoreTable, limit: Limit) -> int:
    """The parameters of the layers that a limit is about."""
    inside = inside_of(table, limit)
    return sum(layer.parameters for layer, taken in zip(table.layers, inside, strict=True) if taken)


def row_of(
    table: ScoreTable,
    limit: Limit,
    groups: tuple[tuple[int, ...], ...],
    covers: Mapping[int, Covers],
    offered: NDArray[np.bool_],
) -> Row:
    """A limit as a row over groups and cells; `offered` says which cells there are. Raises BudgetError for an
    unknown resource.
    """
    quantity = quantity_of(table, limit)
    usage, scale = _usage(table, quantity, groups, covers, offered)
    unit = Fraction(1, scale)
    if limit.resource == BITS_PER_WEIGHT:
        unit = unit * 8 / parameters_of(table, limit)
    value = limit.value / unit
    if limit.of_range:
        ranges = {group: one.ranges[quantity] for group, one in covers.items()}
        value = _ranged(limit, usage, offered, {group: pair for group, pair in ranges.items() if pair}, scale)
    whole = math.floor(value) if limit.relation == "<=" else math.ceil(value)
    return Row(limit.name, limit.relation, usage, whole, unit)


def _usage(
    table: ScoreTable,
    quantity: Quantity,
    groups: tuple[tuple[int, ...], ...],
    covers: Mapping[int, Covers],
    offered: NDArray[np.bool_],
) -> tuple[IntMatrix, int]:
    """Integers per (group, cell), 0 where nothing is offered, and how many of them make 1."""
    if not covers and quantity.kind == "resource":
        return _kept_usage(table, quantity, groups, offered)
    rows = [[value or 0 for value in row] for row in amounts_of(table, quantity)]
    combined = {group: [value or 0 for value in one.totals[quantity]] for group, one in covers.items()}
    scale = math.lcm(*(value.denominator for row in (*rows, *combined.values()) for value in row))

    def whole(values: Sequence[Exact]) -> list[int]:
        return [value.numerator * (scale // value.denominator) for value in values]

    width, own, summed = offered.shape[1], [whole(row) for row in rows], []
    for group, layers in enumerate(groups):
        if group in combined:
            cells = whole(combined[group])
        else:
            cells = own[layers[0]] if len(layers) == 1 else _summed([own[i] for i in layers])
        summed.append(cells + [0] * (width - len(cells)) if len(cells) < width else cells)
    return np.where(offered, integer_matrix(summed), 0), scale


def _kept_usage(
    table: ScoreTable, quantity: Quantity, groups: tuple[tuple[int, ...], ...], offered: NDArray[np.bool_]
) -> tuple[IntMatrix, int]:
    """The same for cells of a resource, from the integers that the table keeps."""
    whole, unit = table.whole(quantity.name)
    if quantity.layers:
        inside = [name in quantity.layers for name in table.layer_names]
        whole = np.where(np.array(inside)[:, None], whole, 0)
    if len(groups) == len(table.layers):
        summed = whole[[layers[0] for layers in groups]]
    else:
        summed = np.array([whole[list(layers)].sum(axis=0) for layers in groups])
    return np.where(offered, summed, 0), unit.denominator


def _summed(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _ranged(
    limit: Limit,
    usage: IntMatrix,
    offered: NDArray[np.bool_],
    ranges: Mapping[int, tuple[Exact, Exact]],
    scale: int,
) -> Fraction:
    """The limit as a part of the range; `ranges` are those of groups whose cells are not all there."""
    low, high = 0, 0
    for group in np.flatnonzero(offered.any(axis=1)).tolist():
        row = usage[group][offered[group]]
        ends = ranges.get(group, (Fraction(int(row.min()), scale), Fraction(int(row.max()), scale)))
        low, high = low + int(scale * ends[0]), high + int(scale * ends[1])
    return low + limit.value * (high - low)
