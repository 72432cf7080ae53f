"""Calibration data made from a model alone: the units that make them, the file they become. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.checkpoints.shards import Shard, Slot
from quant.safetensors_header import DTYPE_BYTES
from sensitivity.catalog import DATA_FREE
from sensitivity.units import MakeUnit
from service.errors import TooLarge
from service.wire import MakeCalibrationRequest

SESSION = "sensitivity.data_free.session:MakingSession"
KIND = "safetensors"
UNIT_BYTES = 2**26
"""What a worker hands over at a time, about."""
DTYPES = {"int64": "I64", "float32": "F32"}
"""Types of made samples, as safetensors calls them."""

Arrays = Mapping[str, NDArray[Any]]


def units_of(request: MakeCalibrationRequest) -> list[MakeUnit]:
    """The units that make the samples of a request, in their order."""
    entry = DATA_FREE[request.method]
    tokens = entry.makes == "tokens"
    batch = max(1, min(entry.batch, UNIT_BYTES // (sample_bytes(request) or 1)))
    return [
        MakeUnit(
            request.method,
            start,
            min(start + batch, request.samples),
            request.sequence_length if tokens else 0,
            () if tokens else tuple(request.shape),
            request.seed,
        )
        for start in range(0, request.samples, batch)
    ]


def sample_bytes(request: MakeCalibrationRequest) -> int | None:
    """Bytes of one sample in the file; None for images of a shape that only the model says."""
    if DATA_FREE[request.method].makes == "tokens":
        return DTYPE_BYTES["I64"] * request.sequence_length
    return DTYPE_BYTES["F32"] * prod(request.shape) if request.shape else None


def require_size(request: MakeCalibrationRequest, most: int) -> None:
    """Raise TooLarge for samples that would take more than `most` bytes, as far as the request tells."""
    _require(least_size(request), most)


def least_size(request: MakeCalibrationRequest) -> int:
    """Bytes that the samples take at least, as far as the request tells."""
    return request.samples * (sample_bytes(request) or 0)


def write_samples(parts: Iterator[Arrays], rows: int, file: Path, most: int) -> None:
    """A calibration file of the units' arrays, in their order, one unit in memory at a time; `rows` are all
    of them. Equal arrays give equal bytes. Raises TooLarge before anything of more than `most` bytes is
    written.
    """
    first = next(parts)
    slots = {name: Slot(DTYPES[array.dtype.name], (rows, *array.shape[1:])) for name, array in first.items()}
    shard = Shard(file.name, {}, slots)
    _require(shard.payload_bytes, most)
    ends = {name: len(shard.header) + start for name, start in shard.offsets.items()}
    with file.open("xb") as out:
        out.write(shard.header)
        for part in chain([first], parts):
            for name, array in part.items():
                out.seek(ends[name])
                out.write(np.ascontiguousarray(array).data)
                ends[name] += array.nbytes


def _require(size: int, most: int) -> None:
    if size > most:
        raise TooLarge(
            "too-large",
            f"Calibration data must have at most {most} bytes in all. Got {size}. "
            "Ask for fewer or smaller samples.",
        )
