"""The header of a safetensors file, read without torch and checked before anything is allocated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quant.reading import Node, ReadError

LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000
MOST_DIMENSIONS = 16
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


class HeaderError(ValueError):
    """A file that is not safetensors, or whose header does not fit its bytes."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: safetensors type name, shape, first byte in the file, and size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Tensors by name, and the file's free-form metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path | str) -> Header:
    """Read and check the header: every tensor's bytes must lie in the file and fit its shape.

    Raises HeaderError that says what is wrong with the file.
    """
    file = Path(path)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(LONGEST_HEADER, size - LENGTH_BYTES):
            raise HeaderError(
                f"File must be safetensors. Got {file.name!r}, whose header is longer than the file."
                " Save with safetensors; pickles are never read."
            )
        text = stream.read(length)
    try:
        document = json.loads(text, object_pairs_hook=_unique)
        json.dumps(document, ensure_ascii=False).encode()  # raises for half of a surrogate pair
        root = dict(Node(document).members())
        metadata = {
            name: node.text()
            for name, node in (root.pop("__metadata__").members() if "__metadata__" in root else ())
        }
        first = LENGTH_BYTES + length
        tensors = {name: _entry(node, first, size) for name, node in root.items()}
    except (ReadError, RecursionError, ValueError) as error:
        raise HeaderError(f"Header of {file.name!r} must be valid safetensors. {error}") from error
    return Header(tensors, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ReadError(f"Names must be unique. Got {len(pairs) - len(members)} of {len(pairs)} twice.")
    return members


def _entry(node: Node, first: int, size: int) -> TensorEntry:
    fields = node.fields("dtype", "shape", "data_offsets")
    dtype = fields["dtype"].text()
    shape = tuple(item.integer() for item in fields["shape"].items())
    if len(shape) > MOST_DIMENSIONS:
        raise fields["shape"].error(f"at most {MOST_DIMENSIONS} sizes", "Download the file again.")
    offsets = [item.integer() for item in fields["data_offsets"].items()]
    if len(offsets) != 2 or offsets[1] < offsets[0] or first + offsets[1] > size:
        raise fields["data_offsets"].error("two offsets inside the file", "Download the file again.")
    nbytes = offsets[1] - offsets[0]
    if dtype in DTYPE_BYTES and prod(shape) * DTYPE_BYTES[dtype] != nbytes:
        raise fields["data_offsets"].error(
            f"the {prod(shape) * DTYPE_BYTES[dtype]} bytes of its shape", "Download the file again."
        )
    return TensorEntry(dtype, shape, first + offsets[0], nbytes)
