"""Reading a safetensors header before anything is loaded: every size, offset and shape must fit the file.

The layout is 8 bytes (little endian: the length of the header), the header as JSON, then the tensors
without gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, NoReturn

from service.errors import Unprocessable
from service.ingest.strict_json import parse_object

LARGEST_HEADER = 100_000_000
MOST_TENSORS = 200_000
MOST_DIMENSIONS = 16
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip file, such as torch.save writes (a pickle)"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "a gzip file"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header; `begin` and `end` are byte offsets after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return self.end - self.begin


def read_header(file: BinaryIO, size: int, *, name: str) -> tuple[TensorEntry, ...]:
    """The tensors of a safetensors file of `size` bytes; raises Unprocessable `invalid-safetensors` that
    names the file.
    """
    start = file.read(8)
    for signature, what in _SIGNATURES:
        if start.startswith(signature):
            _fail(
                name,
                f"{what} renamed to .safetensors",
                "Save it with safetensors.torch.save_file(tensors, file).",
            )
    if len(start) < 8:
        _fail(name, f"{size} bytes, too few for a header")
    length = int.from_bytes(start, "little")
    if length > min(size - 8, LARGEST_HEADER):
        _fail(
            name, f"a header of {length} bytes in a file of {size} bytes (at most {LARGEST_HEADER} are read)"
        )
    header = parse_object(
        file.read(length), what=f"The header of {name}", slug="invalid-safetensors", largest=LARGEST_HEADER
    )
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        _fail(name, f"{len(header)} tensors, at most {MOST_TENSORS} are read")
    entries = tuple(_entry(name, tensor, facts) for tensor, facts in header.items())
    _check_layout(name, entries, size - 8 - length)
    return entries


def _entry(name: str, tensor: str, facts: Any) -> TensorEntry:
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        _fail(name, f"tensor {tensor[:200]!r} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(name, f"tensor {tensor[:200]!r} of unknown dtype {str(dtype)[:40]!r}")
    if not _are_counts(shape) or len(shape) > MOST_DIMENSIONS:
        _fail(name, f"tensor {tensor[:200]!r} of shape {str(shape)[:80]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        _fail(name, f"tensor {tensor[:200]!r} with data_offsets {str(offsets)[:80]}")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        _fail(
            name,
            f"tensor {tensor[:200]!r} of shape {shape} and dtype {dtype}, {bits / 8:g} bytes, "
            f"at data_offsets {offsets}, {offsets[1] - offsets[0]} bytes",
        )
    return TensorEntry(tensor, dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    """Whether this is a list of integers from 0 to 2^63 - 1."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(name: str, entries: Sequence[TensorEntry], payload: int) -> None:
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            what = "overlapping" if entry.begin < position else "a gap before"
            _fail(
                name,
                f"{what} tensor {entry.name[:200]!r} at byte {entry.begin}, where {position} was expected",
            )
        position = entry.end
    if position != payload:
        _fail(name, f"tensors that end at byte {position} of {payload}", "Send the whole file again.")


def _fail(
    name: str, reason: str, next_step: str = "Write it again with safetensors.torch.save_file."
) -> NoReturn:
    raise Unprocessable(
        "invalid-safetensors", f"{name} must be a safetensors file. Got {reason}. {next_step}"
    )
