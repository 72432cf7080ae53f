"""The formats that Bitplan offers. A new family is one file and one line of FORMATS."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from quant.floating import FLOAT, FloatFormat
from quant.gguf_blocks import GGUF, GgufFormat
from quant.integer import INTEGER, Granularity, IntegerFormat, ScaleType
from quant.microscaling import MICROSCALING, BlockFormat
from quant.plain import PLAIN, PlainFormat
from quant.storage import Family, Format, Matrix, Storage

__all__ = [
    "FORMATS",
    "BlockFormat",
    "Family",
    "FloatFormat",
    "Format",
    "GgufFormat",
    "Granularity",
    "IntegerFormat",
    "Matrix",
    "PlainFormat",
    "ScaleType",
    "Storage",
    "codec_of",
]

FORMATS: dict[str, Family] = {
    "integer": INTEGER,
    "float": FLOAT,
    "microscaling": MICROSCALING,
    "gguf": GGUF,
    "plain": PLAIN,
}


def codec_of(fmt: Format) -> ModuleType:
    """The module that encodes and packs a format; importing it loads torch."""
    return import_module(FORMATS[fmt.family].codec)
