"""Rounding keys and values as a cache of a smaller type keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.codecs.elements import snap
from quant.elements import ELEMENTS
from quant.packing import stored_scale

FLOATS = {"fp8_e4m3": ELEMENTS["e4m3"], "fp8_e5m2": ELEMENTS["e5m2"]}
INTEGERS = {"int8": 127.0, "int4": 7.0}


def round_cached(values: Tensor, kind: str) -> Tensor:
    """Keys or values (..., head size) after they were in the cache: same shape, type and device.

    Floats have no scale and saturate. Integers are symmetric, with one float16 scale for each token and head.
    Other kinds are types of their own, without scales.
    """
    exact = values.float()
    if kind in FLOATS:
        return snap(exact, FLOATS[kind]).to(values.dtype)
    if kind in INTEGERS:
        top = INTEGERS[kind]
        scale = stored_scale(exact.abs().amax(dim=-1, keepdim=True) / top, "float16").float()
        return (exact / scale).round_().clamp_(-top - 1, top).mul_(scale).to(values.dtype)
    return values.to(getattr(torch, kind)).to(values.dtype)
