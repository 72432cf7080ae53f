"""Reading `bitplan.table/1`: every fault is named by its JSON pointer."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sensitivity.table import (
    SCHEMA,
    Exact,
    ExactMatrix,
    Fused,
    Maximum,
    MetricTable,
    ScoreTable,
    TableError,
    TableLayer,
)

RESERVED = "bits_per_weight"
MOST_DIGITS = 400
LARGEST_RESOURCE = 10**30
MOST_DECIMALS = 60

_T = TypeVar("_T")
_TABLE_KEYS = ("schema", "layers", "schemes", "metrics", "resources", "maxima", "fused", "interactions")
_LAYER_KEYS = ("name", "parameters", "macs", "group", "role", "kept")
_MAXIMUM_KEYS = ("resource", "cuts")
_METRIC_KEYS = ("direction", "values", "stderr")
_FUSED_KEYS = ("layers", "scheme", "metrics", "stderr", "resources")


class _Object(dict[str, object]):
    duplicate: str | None = None


def parse_table(source: str | bytes) -> ScoreTable:
    """Reads a table.

    Raises TableError, with the JSON pointer, for anything that is not exactly a `bitplan.table/1`: unknown or
    missing fields, duplicate keys or names, ragged rows, NaN or infinity, a layer that is offered no scheme.
    """
    document = _fields(_load(source), "", _TABLE_KEYS, required=_TABLE_KEYS[:5])
    if document["schema"] != SCHEMA:
        raise _fault("/schema", f'must be "{SCHEMA}"', document["schema"])
    layers = tuple(
        _layer(item, f"/layers/{i}") for i, item in enumerate(_list(document["layers"], "/layers"))
    )
    schemes = tuple(
        _name(item, f"/schemes/{i}") for i, item in enumerate(_list(document["schemes"], "/schemes"))
    )
    _refuse_duplicates([layer.name for layer in layers], "/layers/{}/name")
    _refuse_duplicates(schemes, "/schemes/{}")
    shape = (len(layers), len(schemes))
    table = ScoreTable(
        layers,
        schemes,
        {
            name: _metric(item, f"/metrics/{_escape(name)}", shape)
            for name, item in _named(document, "metrics")
        },
        {name: _resource(item, name, shape) for name, item in _named(document, "resources", empty=True)},
        _maxima(document, [layer.name for layer in layers]),
        {
            name: _factor(item, f"/interactions/{_escape(name)}", shape)
            for name, item in (_named(document, "interactions") if "interactions" in document else ())
        },
    )
    if document.get("fused") not in (None, []):
        items = _list(document["fused"], "/fused")
        table = replace(
            table, fused=tuple(_fused(item, f"/fused/{i}", table) for i, item in enumerate(items))
        )
    _refuse_unoffered(table)
    _refuse_bad_caches(table)
    return table


def _load(source: str | bytes) -> object:
    try:
        text = source.decode("utf-8-sig") if isinstance(source, bytes) else source
        return json.loads(
            text,
            parse_float=Decimal,
            parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else Decimal(digits),
            parse_constant=Decimal,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise TableError(f"The table must be UTF-8 text. Got a bad byte at offset {error.start}.") from None
    except json.JSONDecodeError as error:
        raise TableError(
            f"The table must be JSON. Got {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise TableError(
            "The table must be JSON of the documented shape. Got too many nested brackets."
        ) from None


def _object(pairs: list[tuple[str, object]]) -> _Object:
    result = _Object()
    for key, value in pairs:
        if key in result:
            result.duplicate = key
        result[key] = value
    return result


def _layer(item: object, at: str) -> TableLayer:
    fields = _fields(item, at, _LAYER_KEYS, required=_LAYER_KEYS[:2])
    return TableLayer(
        _name(fields["name"], f"{at}/name"),
        _count(fields["parameters"], f"{at}/parameters", least=1 if fields.get("kept") is None else 0),
        _optional(fields.get("macs"), lambda value: _count(value, f"{at}/macs", least=0)),
        _optional(fields.get("group"), lambda value: _name(value, f"{at}/group")),
        _optional(fields.get("role"), lambda value: _name(value, f"{at}/role")),
        _optional(fields.get("kept"), lambda value: _name(value, f"{at}/kept")),
    )


def _metric(item: object, at: str, shape: tuple[int, int]) -> MetricTable:
    fields = _fields(item, at, _METRIC_KEYS, required=_METRIC_KEYS[:2])
    direction = fields["direction"]
    if direction not in ("min", "max"):
        raise _fault(f"{at}/direction", 'must be "min" or "max"', direction)
    values = _floats(fields["values"], f"{at}/values", shape)
    stderr = None
    if fields.get("stderr") is not None:
        stderr = _floats(fields["stderr"], f"{at}/stderr", shape)
        _refuse_bad_stderr(values, stderr, f"{at}/stderr")
    return MetricTable("min" if direction == "min" else "max", values, stderr)


def _resource(item: object, name: str, shape: tuple[int, int]) -> ExactMatrix:
    at = f"/resources/{_escape(name)}"
    if name == RESERVED:
        raise TableError(
            f"{at} must be left out: it follows from bytes and parameters. Got it as a resource."
        )
    return _matrix(item, at, shape, _exact)


def _maxima(document: Mapping[str, object], layers: Sequence[str]) -> dict[str, Maximum]:
    if document.get("maxima") is None:
        return {}
    return {
        name: _maximum(item, name, document, layers) for name, item in _named(document, "maxima", empty=True)
    }


def _maximum(item: object, name: str, document: Mapping[str, object], layers: Sequence[str]) -> Maximum:
    at = f"/maxima/{_escape(name)}"
    resources = [known for known, _ in _named(document, "resources", empty=True)]
    if name in (*resources, RESERVED, *(known for known, _ in _named(document, "metrics"))):
        raise TableError(f"{at} must have a name of its own. Got that of a resource or metric.")
    fields = _fields(item, at, _MAXIMUM_KEYS, required=_MAXIMUM_KEYS)
    if fields["resource"] not in resources:
        raise _fault(
            f"{at}/resource", f"must be a resource of the table: {', '.join(resources)}", fields["resource"]
        )
    cuts = [
        tuple(
            _member(layer, f"{at}/cuts/{i}/{j}", layers)
            for j, layer in enumerate(_list(cut, f"{at}/cuts/{i}"))
        )
        for i, cut in enumerate(_list(fields["cuts"], f"{at}/cuts"))
    ]
    for i, cut in enumerate(cuts):
        _refuse_duplicates(cut, f"{at}/cuts/{i}/{{}}")
    return Maximum(str(fields["resource"]), tuple(cuts))


def _member(layer: object, at: str, layers: Container[object]) -> str:
    if not isinstance(layer, str) or layer not in layers:
        raise _fault(at, "must be the name of a layer", layer)
    return layer


def _fused(item: object, at: str, table: ScoreTable) -> Fused:
    """A candidate whose layers and scheme are the table's, offered under some metric."""
    fields = _fields(item, at, _FUSED_KEYS, required=_FUSED_KEYS[:2])
    layers = [
        _member(name, f"{at}/layers/{i}", table.row_of)
        for i, name in enumerate(_list(fields["layers"], f"{at}/layers"))
    ]
    _refuse_duplicates(layers, f"{at}/layers/{{}}")
    if len(layers) < 2:
        raise TableError(f"{at}/layers must name at least two layers. Got {layers[0]!r} alone.")
    if fields["scheme"] not in table.schemes:
        raise _fault(
            f"{at}/scheme", f"must be a scheme of the table: {', '.join(table.schemes)}", fields["scheme"]
        )
    found = Fused(
        tuple(layers),
        str(fields["scheme"]),
        _numbers(fields, "metrics", at, table.metrics, _float),
        _numbers(fields, "stderr", at, table.metrics, _float),
        _numbers(fields, "resources", at, table.resources, _exact),
    )
    for metric, error in found.stderr.items():
        if error < 0 or metric not in found.metrics:
            raise TableError(
                f"{at}/stderr/{_escape(metric)} must be 0 or more and belong to a score of the candidate's "
                f"own. Got {error}."
            )
    if not any(table.fused_offered(found, metric) for metric in table.metrics):
        lacking = [name for name in table.resources if table.fused_usage(found, name) is None]
        where = (
            f"resources/{_escape(lacking[0])}" if lacking else f"metrics/{_escape(next(iter(table.metrics)))}"
        )
        raise TableError(
            f"{at}/{where} must be given, since a layer of the candidate has no number of its own at "
            f"{found.scheme}. Got none. Give it, or leave the candidate out."
        )
    return found


def _numbers(
    fields: Mapping[str, object],
    member: str,
    at: str,
    known: Mapping[str, object],
    read: Callable[[object, str], _T],
) -> dict[str, _T]:
    """Numbers by name, all names known; an absent member has none."""
    if fields.get(member) is None:
        return {}
    items = _fields(fields[member], f"{at}/{member}", tuple(known), ())
    for name, value in items.items():
        if value is None:
            raise TableError(
                f"{at}/{member}/{_escape(name)} must be a number. Got null. Leave it out for the sum of the "
                "layers' own numbers."
            )
    return {name: read(value, f"{at}/{member}/{_escape(name)}") for name, value in items.items()}


def _floats(item: object, at: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    rows = _matrix(item, at, shape, _float)
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def _factor(item: object, at: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Vectors of one length by layer and scheme; `null` is 0."""
    rows = _matrix(item, at, shape, _vector)
    longest = max((len(vector) for row in rows for vector in row if vector is not None), default=0)
    for i, row in enumerate(rows):
        for j, vector in enumerate(row):
            if vector is not None and len(vector) != longest:
                raise _fault(f"{at}/{i}/{j}", f"must have {longest} numbers, as the others have", vector)
    return np.array([[vector or [0.0] * longest for vector in row] for row in rows], dtype=np.float64)


def _vector(value: object, at: str) -> list[float]:
    return [_float(item, f"{at}/{k}") for k, item in enumerate(_list(value, at))]


def _matrix(
    item: object, at: str, shape: tuple[int, int], read: Callable[[object, str], _T]
) -> tuple[tuple[_T | None, ...], ...]:
    rows = _sized(item, at, shape[0], "row", "layer")
    return tuple(
        tuple(
            None if value is None else read(value, f"{at}/{i}/{j}")
            for j, value in enumerate(_sized(row, f"{at}/{i}", shape[1], "value", "scheme"))
        )
        for i, row in enumerate(rows)
    )


def _float(value: object, at: str) -> float:
    number = float(_number(value, at))
    if not np.isfinite(number):
        raise _fault(at, "must be a finite number or null", value)
    return number


def _exact(value: object, at: str) -> Exact:
    number = _number(value, at)
    exponent = number.as_tuple().exponent if isinstance(number, Decimal) else 0
    too_fine = isinstance(exponent, int) and exponent < -MOST_DECIMALS
    if too_fine or not -LARGEST_RESOURCE <= number <= LARGEST_RESOURCE:
        raise _fault(at, f"must be at most 1e30 and have at most {MOST_DECIMALS} decimals", value)
    fraction = Fraction(number)
    return fraction.numerator if fraction.denominator == 1 else fraction


def _number(value: object, at: str) -> int | Decimal:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise _fault(at, "must be a number or null", value)
    if isinstance(value, Decimal) and not value.is_finite():
        raise _fault(at, "must be a finite number or null", value)
    if isinstance(value, Decimal) and value and value.adjusted() > MOST_DIGITS:
        raise _fault(at, "must be a finite number or null", value)
    return value


def _count(value: object, at: str, least: int) -> int:
    number = _number(value, at) if value is not None else None
    if number is None or number != int(number) or not least <= number <= 2**63:
        raise _fault(at, f"must be an integer from {least} to 2^63", value)
    return int(number)


def _name(value: object, at: str) -> str:
    if not isinstance(value, str) or not value or len(value) > 1000:
        raise _fault(at, "must be a text of 1 to 1000 characters", value)
    return value


def _optional(value: object, read: Callable[[object], _T]) -> _T | None:
    return None if value is None else read(value)


def _named(document: Mapping[str, object], key: str, empty: bool = False) -> list[tuple[str, object]]:
    fields = _fields(document[key], f"/{key}", None, ())
    if not fields and not empty:
        raise _fault(f"/{key}", "must have at least one entry", {})
    return [(_name(name, f"/{key}/{_escape(name)}"), item) for name, item in fields.items()]


def _fields(
    item: object, at: str, known: Sequence[str] | None, required: Sequence[str]
) -> Mapping[str, object]:
    if not isinstance(item, _Object):
        raise _fault(at, "must be an object", item)
    if item.duplicate is not None:
        raise TableError(f"{at}/{_escape(item.duplicate)} must appear once. Got it twice.")
    for key in item:
        if known is not None and key not in known:
            raise TableError(f"{at}/{_escape(key)} must be one of {', '.join(known)}. Got an unknown field.")
    for key in required:
        if key not in item:
            raise TableError(f"{at}/{key} must be present. Got an object without it.")
    return item


def _list(item: object, at: str) -> list[object]:
    if not isinstance(item, list) or not item:
        raise _fault(at, "must be a list with at least one entry", item)
    return item


def _sized(item: object, at: str, size: int, what: str, per: str) -> list[object]:
    if not isinstance(item, list) or len(item) != size:
        got = f"{len(item)} {what}s" if isinstance(item, list) else _shown(item)
        raise TableError(f"{at} must be a list with one {what} per {per} ({size}). Got {got}.")
    return item


def _refuse_duplicates(names: Sequence[str], at: str) -> None:
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            raise TableError(f"{at.format(i)} must be unique. Got {name!r} twice.")
        seen.add(name)


def _refuse_bad_stderr(values: NDArray[np.float64], stderr: NDArray[np.float64], at: str) -> None:
    bad = (stderr < 0) | (~np.isnan(stderr) & np.isnan(values))
    for i, j in np.argwhere(bad):
        raise TableError(f"{at}/{i}/{j} must be 0 or more and belong to a value. Got {stderr[i, j]}.")


def _refuse_unoffered(table: ScoreTable) -> None:
    for metric in table.metrics:
        covered = {name for one in table.fused if table.fused_offered(one, metric) for name in one.layers}
        for i in np.flatnonzero(~table.offered(metric).any(axis=1)):
            if table.layers[i].name in covered:
                continue
            raise TableError(
                f"/metrics/{_escape(metric)}/values/{i} must offer at least one scheme that every resource "
                f"prices. Got none for layer {table.layers[i].name!r}."
            )


def _refuse_bad_caches(table: ScoreTable) -> None:
    if not table.parameters:
        raise TableError("/layers must have parameters, some of them at least. Got 0 in all.")
    for i, layer in enumerate(table.layers):
        if layer.kept is not None and layer.kept not in table.schemes:
            raise _fault(f"/layers/{i}/kept", "must be one of the schemes", layer.kept)


def _fault(at: str, must: str, got: object) -> TableError:
    return TableError(f"{at or 'The table'} {must}. Got {_shown(got)}.")


def _shown(value: object) -> str:
    if isinstance(value, Decimal):
        text = str(value)
    else:
        text = (
            "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
        )
    return text if len(text) <= 60 else f"{text[:57]}..."


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
