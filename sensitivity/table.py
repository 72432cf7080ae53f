"""The score table: what every (layer, scheme) costs, as people and tools exchange it (`bitplan.table/1`)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SCHEMA = "bitplan.table/1"
SAFE_TOTAL = 2**61

Direction = Literal["min", "max"]
Exact = int | Fraction
ExactMatrix = tuple[tuple[Exact | None, ...], ...]


class TableError(ValueError):
    """A table that cannot be used. The message starts with the JSON pointer of the fault."""


@dataclass(frozen=True)
class TableLayer:
    """One row of the table. Layers that name the same `group` must get the same scheme.

    A cache has no parameters. `kept` is the scheme it has under a uniform one that is not for it.
    """

    name: str
    parameters: int
    macs: int | None = None
    group: str | None = None
    role: str | None = None
    kept: str | None = None


@dataclass(frozen=True, eq=False)
class MetricTable:
    """Scores of one metric, shape (layers, schemes), float64, NaN where the cell is not offered.

    `sources` (layers, schemes) says where each score comes from, if not all were measured.
    """

    direction: Direction
    values: NDArray[np.float64]
    stderr: NDArray[np.float64] | None = None
    sources: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        for array in (self.values, self.stderr, self.sources):
            if array is not None:
                array.setflags(write=False)


@dataclass(frozen=True)
class Maximum:
    """The largest, over cuts, of what the layers of a cut use together of a resource.

    Each cut names the layers whose usage is alive at one moment, as activations are at one point of a pass.
    """

    resource: str
    cuts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Fused:
    """A candidate that covers several layers at once, all with one scheme, by numbers of its own.

    A metric, standard error or resource that is not stated is the sum of the layers' cells at the scheme.
    """

    layers: tuple[str, ...]
    scheme: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    stderr: Mapping[str, float] = field(default_factory=dict)
    resources: Mapping[str, Exact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("metrics", "stderr", "resources"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores and resources of every (layer, scheme).

    A cell is *offered* under a metric when neither the metric nor any resource says `null` there. Resource
    numbers are exact: integers, or fractions read from decimals digit by digit. `maxima` are further
    quantities by name, which limits can be on. `interactions` are factors of shape (layers, schemes, d) by
    metric: what two cells add beyond their scores is twice their inner product. `fused` are candidates that a
    plan may have in place of their layers' own cells.
    """

    layers: tuple[TableLayer, ...]
    schemes: tuple[str, ...]
    metrics: Mapping[str, MetricTable]
    resources: Mapping[str, ExactMatrix] = field(default_factory=dict)
    maxima: Mapping[str, Maximum] = field(default_factory=dict)
    interactions: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()

    def __post_init__(self) -> None:
        for factor in self.interactions.values():
            factor.setflags(write=False)
        object.__setattr__(self, "interactions", MappingProxyType(dict(self.interactions)))
        object.__setattr__(self, "maxima", MappingProxyType(dict(self.maxima)))
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))
        object.__setattr__(self, "resources", MappingProxyType(dict(self.resources)))

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """The layers' names in row order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Parameters of all layers together."""
        return sum(layer.parameters for layer in self.layers)

    def whole(self, resource: str) -> tuple[NDArray[Any], Fraction]:
        """A resource by `whole_numbers`, shape (layers, schemes); kept for the next question."""
        found = self._whole.get(resource)
        if found is None:
            found = self._whole.setdefault(resource, whole_numbers(self.resources[resource]))
        return found

    @cached_property
    def _whole(self) -> dict[str, tuple[NDArray[Any], Fraction]]:
        return {}

    def resources_offered(self) -> NDArray[np.bool_]:
        """Shape (layers, schemes): true where no resource says `null`. Not to be written to."""
        return self._resources_offered

    @cached_property
    def _resources_offered(self) -> NDArray[np.bool_]:
        offered = np.ones((len(self.layers), len(self.schemes)), dtype=bool)
        for rows in self.resources.values():
            offered &= np.array([[value is not None for value in row] for row in rows], dtype=bool)
        offered.setflags(write=False)
        return offered

    def offered(self, metric: str) -> NDArray[np.bool_]:
        """Shape (layers, schemes): true where `metric` and every resource have a number."""
        return self.resources_offered() & ~np.isnan(self.metrics[metric].values)

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """The row of a layer by its name."""
        return {name: row for row, name in enumerate(self.layer_names)}

    def fused_cells(self, fused: Fused) -> tuple[tuple[int, int], ...]:
        """The cells (row, column) of a candidate's layers at its scheme."""
        column = self.schemes.index(fused.scheme)
        return tuple((self.row_of[name], column) for name in fused.layers)

    def fused_score(self, fused: Fused, metric: str) -> Exact | None:
        """A candidate's score: its own, else the exact sum of its cells; None if one has none."""
        return self._fused_sum(fused, fused.metrics.get(metric), self.metrics[metric].values)

    def fused_error(self, fused: Fused, metric: str) -> Exact | None:
        """A candidate's standard error, those of layers added up as if all were wrong the same way; None if
        it is not known, as where a score of its own comes without one.
        """
        errors = self.metrics[metric].stderr
        if metric in fused.metrics or errors is None:
            return Fraction(fused.stderr[metric]) if metric in fused.stderr else None
        return self._fused_sum(fused, None, errors)

    def _fused_sum(self, fused: Fused, stated: float | None, values: NDArray[np.float64]) -> Exact | None:
        found = [stated] if stated is not None else [float(values[cell]) for cell in self.fused_cells(fused)]
        return None if any(map(math.isnan, found)) else sum(map(Fraction, found), Fraction(0))

    def fused_usage(self, fused: Fused, resource: str, layers: Collection[str] = ()) -> Exact | None:
        """What a candidate uses of a resource: its own number, else the sum of its cells; None if one has
        none. Of some `layers` alone (all if empty): a number of its own counts whole where it covers any of
        them, since nobody knows its parts.
        """
        if resource in fused.resources:
            touched = not layers or any(name in layers for name in fused.layers)
            return fused.resources[resource] if touched else 0
        rows, total = self.resources[resource], Fraction(0)
        for name, (row, column) in zip(fused.layers, self.fused_cells(fused), strict=True):
            value = rows[row][column]
            if value is None:
                return None
            total += value if not layers or name in layers else 0
        return total

    def fused_offered(self, fused: Fused, metric: str) -> bool:
        """Whether a candidate has a number of `metric` and of every resource."""
        used = all(self.fused_usage(fused, name) is not None for name in self.resources)
        return used and self.fused_score(fused, metric) is not None


def whole_numbers(rows: ExactMatrix) -> tuple[NDArray[Any], Fraction]:
    """Exact numbers as integers of the same shape, 0 for None, and what one of them stands for.

    Their dtype is int64 where the sum of every row's largest is below 2^61, else Python integers.

    >>> whole_numbers(((1, None), (Fraction(1, 2), 3)))
    (array([[2, 0],
           [1, 6]]), Fraction(1, 2))
    """
    scale = math.lcm(*(cell.denominator for row in rows for cell in row if cell))
    numbers = [[cell.numerator * (scale // cell.denominator) if cell else 0 for cell in row] for row in rows]
    largest = sum(max((abs(number) for number in row), default=0) for row in numbers)
    found = np.array(numbers, dtype=np.int64 if largest < SAFE_TOTAL else object)
    found.setflags(write=False)
    return found, Fraction(1, scale)


def table_json(table: ScoreTable) -> str:
    """The table as canonical JSON: sorted keys, no spaces, exact numbers. `parse_table` is its inverse."""
    return _write(
        {
            "schema": SCHEMA,
            "layers": [_layer_json(layer) for layer in table.layers],
            "schemes": list(table.schemes),
            "metrics": {name: _metric_json(metric) for name, metric in table.metrics.items()},
            "resources": {name: [list(row) for row in rows] for name, rows in table.resources.items()},
            **({"maxima": _maxima_json(table.maxima)} if table.maxima else {}),
            **({"fused": [fused_json(one) for one in table.fused]} if table.fused else {}),
        }
        | (
            {"interactions": {name: factor.tolist() for name, factor in table.interactions.items()}}
            if table.interactions
            else {}
        )
    )


def exact_decimal(value: Exact) -> str:
    """An exact number as JSON text: `12.5` for 25/2. Raises TableError if no finite decimal equals it.

    >>> exact_decimal(Fraction(25, 2)), exact_decimal(7), exact_decimal(Fraction(-1, 8))
    ('12.5', '7', '-0.125')
    """
    number = Fraction(value)
    places, scale = 0, number.denominator
    while scale % 10 == 0:
        scale, places = scale // 10, places + 1
    twos = (scale & -scale).bit_length() - 1
    scale >>= twos
    fives = 0
    while scale % 5 == 0:
        scale, fives = scale // 5, fives + 1
    if scale != 1:
        raise TableError(
            f"A resource must be a finite decimal. Got {number}. Round it before writing the table."
        )
    places += max(twos, fives)
    digits = str(abs(number.numerator) * 10**places // number.denominator).rjust(places + 1, "0")
    text = digits if places == 0 else f"{digits[:-places]}.{digits[-places:]}"
    return f"-{text}" if number < 0 else text


def _layer_json(layer: TableLayer) -> dict[str, object]:
    fields = {"name": layer.name, "parameters": layer.parameters, "macs": layer.macs}
    return {
        key: value
        for key, value in {**fields, "group": layer.group, "role": layer.role, "kept": layer.kept}.items()
        if value is not None
    }


def _maxima_json(maxima: Mapping[str, Maximum]) -> dict[str, object]:
    return {
        name: {"resource": one.resource, "cuts": [list(cut) for cut in one.cuts]}
        for name, one in maxima.items()
    }


def fused_json(fused: Fused) -> dict[str, object]:
    """A candidate as tables and answers write it."""
    numbers = {"metrics": fused.metrics, "stderr": fused.stderr, "resources": fused.resources}
    stated = {member: dict(values) for member, values in numbers.items() if values}
    return {"layers": list(fused.layers), "scheme": fused.scheme, **stated}


def _metric_json(metric: MetricTable) -> dict[str, object]:
    matrices = {"values": metric.values, "stderr": metric.stderr}
    rows = {
        key: [[None if np.isnan(value) else float(value) for value in row] for row in matrix]
        for key, matrix in matrices.items()
        if matrix is not None
    }
    return {"direction": metric.direction, **rows}


def _write(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(key)}:{_write(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_write(item) for item in value) + "]"
    if isinstance(value, Fraction):
        return exact_decimal(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _text(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)
