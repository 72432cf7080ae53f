"""The formats that Bitplan offers. A new family is one file and one line of FORMATS."""

from __future__ import annotations

from quant.integer import INTEGER, Granularity, IntegerFormat, ScaleType
from quant.storage import Family, Format, Matrix, Storage

__all__ = [
    "FORMATS",
    "Family",
    "Format",
    "Granularity",
    "IntegerFormat",
    "Matrix",
    "ScaleType",
    "Storage",
]

FORMATS: dict[str, Family] = {
    "integer": INTEGER,
}
