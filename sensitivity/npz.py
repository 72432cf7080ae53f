"""Arrays of an npz file that a stranger sent: no pickle, no object, and no more bytes than were judged.

An npz is a zip archive of .npy members. Every size is read before what it is the size of: the archive's
directory, the headers, the decompressed data. Front: numpy only.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from quant.safetensors_header import MOST_DIMENSIONS, TensorEntry
from sensitivity.errors import BadCalibration

MOST_ARRAYS = 10_000
LONGEST_READ = 16 * 2**20
"""Bytes that are read at once; the directory of the archive is."""
LONGEST_HEADER = 10_000
LEAST_ROOM = 256 * 2**20
MOST_EXPANSION = 20
"""Decompressed bytes may be so many times those of the file, or LEAST_ROOM."""
DTYPES: Mapping[str, str] = {
    "b1": "BOOL",
    "u1": "U8",
    "i1": "I8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
}
"""numpy's kind and size -> the name that safetensors has for the type."""
_CHUNK = 4 * 2**20


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The arrays by name, with safetensors' names of types; `start` is 0. Raises BadCalibration."""
    with _opened(path) as archive:
        found = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in found:
                raise BadCalibration(f"array {name[:80]!r} must be in the file once. Got it twice.")
            with archive.open(info) as member:
                dtype, shape = _header(member, name, info.file_size)
            found[name] = TensorEntry(DTYPES[_code(dtype)], shape, 0, prod(shape) * dtype.itemsize)
    if not found:
        raise BadCalibration(f"{path.name} must hold at least one array. Got none: name the model's inputs.")
    return dict(sorted(found.items()))


def first_row_not_finite(path: Path, name: str) -> int | None:
    """The first row of a floating array with NaN or infinity, read in pieces; None where all are finite.
    Raises BadCalibration.
    """
    with _opened(path) as archive, archive.open(f"{name}.npy") as member:
        dtype, shape = _header(member, name, archive.getinfo(f"{name}.npy").file_size)
        per_row, begin = max(1, prod(shape[1:])), 0
        for values in _pieces(member, name, dtype, prod(shape)):
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                return int((begin + bad[0]) // per_row)
            begin += len(values)
    return None


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array, in memory. Raises BadCalibration."""
    found: dict[str, NDArray[Any]] = {}
    with _opened(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as member:
                dtype, shape = _header(member, name, info.file_size)
                values: NDArray[Any] = np.empty(prod(shape), dtype.newbyteorder("="))
                begin = 0
                for piece in _pieces(member, name, dtype, prod(shape)):
                    values[begin : begin + len(piece)] = piece
                    begin += len(piece)
            found[name] = values.reshape(shape)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, its directory judged. Whatever is broken in it is a BadCalibration."""
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            _require_sound(path, archive.infolist())
            yield archive
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        struct.error,
        NotImplementedError,
        OverflowError,
    ) as error:
        raise BadCalibration(
            f"{path.name} must be an npz file. Got {error!s:.200}. Save it again with numpy.savez."
        ) from None


def _require_sound(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MOST_ARRAYS:
        raise BadCalibration(f"{path.name} must hold at most {MOST_ARRAYS} arrays. Got {len(members)}.")
    for info in members:
        if not info.filename.endswith(".npy") or info.filename == ".npy":
            raise BadCalibration(
                f"{path.name} must hold arrays alone. Got the member {info.filename[:80]!r}."
            )
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadCalibration(
                f"array {info.filename[:80]!r} must be stored or deflated. Got another method or encryption. "
                "Save it with numpy.savez."
            )
    size, room = sum(info.file_size for info in members), MOST_EXPANSION * path.stat().st_size
    if size > max(room, LEAST_ROOM):
        raise BadCalibration(
            f"arrays must have at most {MOST_EXPANSION} times the bytes of their file, or {LEAST_ROOM}. Got "
            f"{size} decompressed. Save them with numpy.savez, which does not compress."
        )


def _header(member: IO[bytes], name: str, size: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of an array, whose data must fill the rest of its member."""
    start = member.read(12)
    version = start[6:8]
    if start[:6] != npy.MAGIC_PREFIX or version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise BadCalibration(f"array {name[:80]!r} must be in the npy format. Got other bytes.")
    field = "<H" if version == b"\x01\x00" else "<I"
    width = struct.calcsize(field)
    [length] = struct.unpack(field, start[8 : 8 + width])
    if length > LONGEST_HEADER:
        raise BadCalibration(f"the header of array {name[:80]!r} must be short. Got {length} bytes.")
    text = start + member.read(8 + width + length - len(start))
    return _parsed(io.BytesIO(text), name, size - len(text))


def _parsed(header: io.BytesIO, name: str, payload: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
    try:
        version = npy.read_magic(header)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(header, max_header_size=LONGEST_HEADER)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadCalibration(f"array {name[:80]!r} must have an npy header. Got {error!s:.200}.") from None
    if dtype.hasobject:
        raise BadCalibration(
            f"array {name[:80]!r} must hold numbers. Got objects, which are pickles and never read."
        )
    if _code(dtype) not in DTYPES:
        known = ", ".join(DTYPES)
        raise BadCalibration(f"type of array {name[:80]!r} must be one of {known}. Got {str(dtype)[:80]}.")
    if fortran and len(shape) > 1:
        raise BadCalibration(
            f"array {name[:80]!r} must lie row by row. Got Fortran order. Save numpy.ascontiguousarray of it."
        )
    if len(shape) > MOST_DIMENSIONS or any(type(side) is not int or side < 0 for side in shape):
        raise BadCalibration(
            f"array {name[:80]!r} must have sides of 0 or more. Got shape {str(shape)[:80]}."
        )
    if (size := prod(shape) * dtype.itemsize) != payload:
        raise BadCalibration(f"array {name[:80]!r} must have the {size} bytes of its shape. Got {payload}.")
    return dtype, shape


def _code(dtype: np.dtype[Any]) -> str:
    return f"{dtype.kind}{dtype.itemsize}" if dtype.names is None and dtype.subdtype is None else ""


def _pieces(member: IO[bytes], name: str, dtype: np.dtype[Any], count: int) -> Iterator[NDArray[Any]]:
    """So many values, some at a time; a truth value is any byte but 0. Raises BadCalibration for fewer."""
    while count:
        wanted = min(count, _CHUNK // dtype.itemsize)
        data = member.read(wanted * dtype.itemsize)
        if len(data) < wanted * dtype.itemsize:
            raise BadCalibration(f"array {name[:80]!r} must be whole. Got {len(data)} bytes at its end.")
        values: NDArray[Any] = np.frombuffer(data, "u1" if dtype.kind == "b" else dtype)
        yield values != 0 if dtype.kind == "b" else values
        count -= wanted
    member.read(1)


class _Bounded(io.FileIO):
    """A file of which nobody reads more than LONGEST_READ at once: a directory that says it is huge is not
    read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), "rb")
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """As a file. Raises BadCalibration."""
        if size is None or size < 0:
            size = self._size - self.tell()
        if size > LONGEST_READ:
            raise BadCalibration(
                f"the directory of an npz file must have at most {LONGEST_READ} bytes. Got more. Save it "
                "again with numpy.savez."
            )
        return super().read(size) or b""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As a file. Raises zipfile.BadZipFile where the archive says that a member begins before it."""
        if whence == io.SEEK_SET and offset < 0:
            raise zipfile.BadZipFile(f"a member begins at byte {offset}")
        return super().seek(offset, whence)
