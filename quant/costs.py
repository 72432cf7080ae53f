"""What every (layer, scheme) uses up: exact bytes, bits, BOPs and nanoseconds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

from quant.layers import DTYPE_BITS, Layer
from quant.schemes import Scheme, SchemeError, parse_scheme

Cell = int | Fraction | None
Grid = tuple[tuple[Cell, ...], ...]
Latency = dict[str, dict[str, Fraction]]
CSV_COLUMNS = ("layer", "scheme", "latency_ns")
LONGEST_NUMBER = 64
LARGEST_EXPONENT = 30


class CostError(ValueError):
    """A cost that is missing or cannot be read."""


def bits_per_weight(stored_bytes: int, parameters: int) -> float:
    """Stored bits per weight, every stored bit counted.

    >>> bits_per_weight(24, 35)
    5.485714285714286
    """
    return 8 * stored_bytes / parameters


def bops(layer: Layer, scheme: Scheme) -> int | None:
    """Bit operations of one sample: MACs * weight bits * activation bits (van Baalen et al. 2020).

    Activations that no format rounds have the layer's own precision (32 or 16 bits). None where the layer
    has no MAC count.
    """
    bits = DTYPE_BITS[layer.dtype] if scheme.activation is None else scheme.activation.bits
    return None if layer.macs is None else layer.macs * scheme.weight_bits * bits


def resources(
    layers: Sequence[Layer],
    schemes: Sequence[Scheme],
    latency: Latency | None = None,
    energy: Latency | None = None,
) -> dict[str, Grid]:
    """Layers x schemes grids of what each choice uses up; None where a format refuses the layer.

    "bytes" are those of the packed tensors, "bits" are 8 * bytes, "bops" are left out when a layer has no
    MAC count, "latency_ns" and "energy_pj" when no table is given.

    Raises CostError naming the cells that a table lacks.
    """
    stored = tuple(tuple(_bytes(layer, scheme) for scheme in schemes) for layer in layers)
    grids: dict[str, Grid] = {
        "bytes": stored,
        "bits": tuple(tuple(None if cell is None else 8 * cell for cell in row) for row in stored),
    }
    if all(layer.macs is not None for layer in layers):
        grids["bops"] = tuple(
            tuple(
                None if cell is None else bops(layer, scheme)
                for cell, scheme in zip(row, schemes, strict=True)
            )
            for layer, row in zip(layers, stored, strict=True)
        )
    if latency is not None:
        grids["latency_ns"] = _table_grid(layers, schemes, stored, latency)
    if energy is not None:
        grids["energy_pj"] = _table_grid(layers, schemes, stored, energy)
    return grids


def _bytes(layer: Layer, scheme: Scheme) -> int | None:
    refused = scheme.refuses(layer)
    return None if refused else scheme.storage(layer.matrix).bytes


def _table_grid(layers: Sequence[Layer], schemes: Sequence[Scheme], offered: Grid, table: Latency) -> Grid:
    missing: list[str] = []
    grid = []
    for layer, cells in zip(layers, offered, strict=True):
        known = next((table[name] for name in layer.names if name in table), {})
        row: list[Cell] = []
        for scheme, cell in zip(schemes, cells, strict=True):
            value = None if cell is None else known.get(scheme.name)
            if cell is not None and value is None:
                missing.append(f"{layer.name} x {scheme.name}")
            row.append(value)
        grid.append(tuple(row))
    if missing:
        raise CostError(
            f"Cost table must hold every layer and scheme. Got none for {', '.join(missing[:5])}"
            f" ({len(missing)} missing). Measure and add them."
        )
    return tuple(grid)


def read_latency_table(text: str, kind: Literal["json", "csv"]) -> Latency:
    """Read nanoseconds per layer and scheme, exactly.

    JSON is {layer: {scheme: ns}} or [{"layer", "scheme", "latency_ns"}, ...]; CSV has the header
    layer,scheme,latency_ns. Scheme names are read by the one grammar, so "w4-channel" is "w4".

    >>> read_latency_table("layer,scheme,latency_ns\\nfc,w4,12.5", "csv")
    {'fc': {'w4': Fraction(25, 2)}}

    Raises CostError naming the row or cell.
    """
    if kind == "csv":
        return _table(_csv_rows(text))
    try:
        value = json.loads(
            text, parse_float=str, parse_int=str, parse_constant=str, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, CostError):
            raise
        raise CostError(f"Cost table must be JSON. Got {error}. Check the file.") from error
    return _table(_json_rows(value))


def latency_from_mapping(table: Mapping[str, Mapping[str, int | float | str]]) -> Latency:
    """The same from values already decoded: {layer: {scheme: ns}}; floats are read as they are written."""
    return _table(_json_rows(table))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CostError(f"Cost table must name every entry once. Got {twice!r} twice. Drop one.")
    return value


def _csv_rows(text: str) -> Iterable[tuple[str, str, Any]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    header = tuple(name.strip() for name in reader.fieldnames or ())
    if header != CSV_COLUMNS:
        raise CostError(
            f"Cost CSV must start with the header {','.join(CSV_COLUMNS)}."
            f" Got {','.join(header)!r:.80}. Correct the first line."
        )
    reader.fieldnames = list(CSV_COLUMNS)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise CostError(
                    f"Cost CSV must have {len(CSV_COLUMNS)} cells in every row."
                    f" Got another number in line {reader.line_num}. Correct the line."
                )
            yield row["layer"], row["scheme"], row["latency_ns"]
    except csv.Error as error:
        raise CostError(
            f"Cost CSV must be readable. Got {error} in line {reader.line_num}. Correct the line."
        ) from error


def _json_rows(value: Any) -> Iterable[tuple[str, str, Any]]:
    if isinstance(value, Mapping):
        for layer, row in value.items():
            if not isinstance(row, Mapping):
                raise CostError(
                    f"Cost of layer {layer!r} must be an object of numbers by scheme."
                    f" Got {row!r:.60}. Write {{layer: {{scheme: ns}}}}."
                )
            yield from ((layer, scheme, cell) for scheme, cell in row.items())
        return
    if not isinstance(value, list):
        raise CostError(
            f"Cost table must be an object of layers or a list of rows. Got {value!r:.60}."
            " Write {layer: {scheme: ns}}."
        )
    for index, row in enumerate(value):
        if not isinstance(row, Mapping) or set(row) != set(CSV_COLUMNS):
            raise CostError(
                f"Cost row {index} must have the fields {', '.join(CSV_COLUMNS)}. Got {row!r:.60}."
                " Correct the row."
            )
        yield row["layer"], row["scheme"], row["latency_ns"]


def _table(rows: Iterable[tuple[str, str, Any]]) -> Latency:
    table: Latency = {}
    for layer, text, cell in rows:
        if not isinstance(layer, str) or not layer.strip():
            raise CostError(f"Cost layer must be a name. Got {layer!r:.60}. Correct the row.")
        try:
            scheme = parse_scheme(text).name
        except SchemeError as error:
            raise CostError(f"Cost table names a scheme that cannot be read: {error}") from error
        cells = table.setdefault(layer.strip(), {})
        if scheme in cells:
            raise CostError(f"Cost table must name every cell once. Got {layer} x {scheme} twice. Drop one.")
        cells[scheme] = _nanoseconds(cell, f"{layer} x {scheme}")
    if not table:
        raise CostError("Cost table must hold at least one row. Got none. Add layer, scheme, latency_ns.")
    return table


def _nanoseconds(cell: Any, where: str) -> Fraction:
    text = str(cell).strip()
    try:
        value = Decimal(text) if len(text) <= LONGEST_NUMBER and not isinstance(cell, bool) else None
    except InvalidOperation:
        value = None
    if value is None or not value.is_finite() or value < 0 or abs(value.adjusted()) > LARGEST_EXPONENT:
        raise CostError(f"Cost of {where} must be a number, 0 or more. Got {text[:60]!r}. Correct it.")
    return Fraction(value)
