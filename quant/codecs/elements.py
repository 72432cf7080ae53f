"""Rounding to small number types, and back: `codes` and `values` are an inverse pair."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from quant.elements import Element

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
CELLS = 256
"""Cells of the table that finds a level of a codebook; no cell is as wide as two levels are apart."""


def values(codes: Tensor, element: Element) -> Tensor:
    """uint8 codes -> the float32 values they stand for."""
    table = _table(element).to(codes.device)
    return table.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


def codes(numbers: Tensor, element: Element) -> Tensor:
    """float32 numbers -> uint8 codes of the nearest values; beyond the range the largest is taken."""
    if element.levels:
        return _level_codes(numbers, element)
    clipped = numbers.clamp(-element.highest, element.highest)
    if element.name in FLOAT8:
        return clipped.to(FLOAT8[element.name]).view(torch.uint8)
    return _small_codes(clipped, element)


def snap(numbers: Tensor, element: Element) -> Tensor:
    """values(codes(numbers)) without the detour over codes."""
    if element.levels:
        return values(_level_codes(numbers, element), element)
    size = numbers.abs().clamp_(max=element.highest)
    exponent = (size.view(torch.int32) >> 23).clamp_(min=element.lowest_exponent + 127)
    step = ((exponent - element.mantissa) << 23).view(torch.float32)
    return (size / step).round_().mul_(step).copysign_(numbers)


@lru_cache(maxsize=8)
def _table(element: Element) -> Tensor:
    if element.levels:
        return torch.tensor(element.levels)
    if element.name in FLOAT8:
        return torch.arange(256, dtype=torch.uint8).view(FLOAT8[element.name]).float()
    half = [_small_value(code, element) for code in range(1 << (element.bits - 1))]
    return torch.tensor(half + [-value for value in half])


def _small_value(code: int, element: Element) -> float:
    """The value of a code without its sign bit.

    >>> from quant.elements import ELEMENTS
    >>> [_small_value(code, ELEMENTS["e2m1"]) for code in range(8)]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    exponent, mantissa = divmod(code, 1 << element.mantissa)
    unit = 2.0 ** (max(exponent, 1) - 1 + element.lowest_exponent - element.mantissa)
    return (mantissa + ((1 << element.mantissa) if exponent else 0)) * unit


def _small_codes(clipped: Tensor, element: Element) -> Tensor:
    """Exponent and mantissa bits of the rounded float32, moved down; subnormals are counted in steps."""
    rounded = snap(clipped, element).abs()
    shift = 23 - element.mantissa
    bias = (126 + element.lowest_exponent) << element.mantissa
    normal = (rounded.view(torch.int32) >> shift) - bias
    steps = (rounded * 2.0 ** (element.mantissa - element.lowest_exponent)).int()
    plain = torch.where(rounded < 2.0**element.lowest_exponent, steps, normal)
    sign = torch.signbit(clipped).to(torch.uint8) << (element.bits - 1)
    return plain.to(torch.uint8) | sign


def _level_codes(numbers: Tensor, element: Element) -> Tensor:
    """The level below a number's cell, or the next one if the number lies beyond their midpoint."""
    base, middle = (table.to(numbers.device) for table in _cells(element))
    cells = (numbers.clamp(-1, 1) + 1).mul_(CELLS / 2).int().reshape(-1)
    lower = base.index_select(0, cells)
    above = numbers.reshape(-1) > middle.index_select(0, cells)
    return (lower + above).to(torch.uint8).reshape(numbers.shape)


@lru_cache(maxsize=8)
def _cells(element: Element) -> tuple[Tensor, Tensor]:
    levels = torch.tensor(element.levels, dtype=torch.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(CELLS + 1, dtype=torch.float64) * (2 / CELLS) - 1
    base = torch.searchsorted(middles, edges - 1e-6)
    above = torch.cat((middles, torch.tensor([torch.inf], dtype=torch.float64)))
    return base.to(torch.int32), above[base].float()
