"""Checks of a calibration file that need neither torch nor the model. Front: numpy only.

What only the model can tell (names of inputs, size of the vocabulary) sensitivity/calibration.py checks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensitivity.errors import BadCalibration
from sensitivity.spec import PARTS, Json

LABELS = "labels"
LEAST_SAMPLES = 2 * len(PARTS)
"""Two samples in each of the three parts: less has no standard error."""
MOST_HEADER_BYTES = 8 * 2**20
MOST_LINE_CHARACTERS = 16 * 2**20
SUFFIXES = {".safetensors": "safetensors", ".txt": "text", ".jsonl": "jsonl"}
_CHUNK = 2**22
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8
}  # fmt: skip
_EXPONENT = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
_EXPONENT |= {"F64": ("<u8", 0x7FF0000000000000)}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (torch.save or npz)",
    b"\x80": "a pickle",
    b"\x93NUMPY": "a npy file",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: [start, stop) are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def check_calibration(path: str | Path, kind: str) -> dict[str, Json]:
    """Facts of a sound file: kind, rows, tensors {name: {dtype, shape}}, has_labels.

    Raises BadCalibration naming the tensor or the row.
    """
    file = Path(path)
    if not file.is_file():
        raise BadCalibration(f"calibration data must be a file. Got {file.name!r}, which is not one.")
    if kind == "safetensors":
        return _safetensors_facts(file)
    if kind in ("text", "jsonl"):
        rows = sum(1 for _ in iterate_rows(file, kind))
        return {"kind": kind, "rows": rows, "tensors": {}, "has_labels": False}
    raise BadCalibration(f"kind must be safetensors, text or jsonl. Got {kind!r}.")


def detect_kind(path: str | Path) -> str:
    """The kind that the suffix names.

    >>> detect_kind("calibration.jsonl")
    'jsonl'
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        names = ", ".join(SUFFIXES)
        raise BadCalibration(f"calibration data must end in one of {names}. Got {Path(path).name!r}.")
    return SUFFIXES[suffix]


# -- safetensors ----------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[TensorEntry, ...]:
    """The tensors of a safetensors file, checked before anything is allocated. Raises BadCalibration."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        _refuse_foreign(start)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
            raise BadCalibration(f"{file.name} must be a safetensors file. Got a header of {length} bytes.")
        text = stream.read(length)
    entries = _parse_header(text, 8 + length, size)
    if not entries:
        raise BadCalibration(f"{file.name} must hold at least one tensor. Got none: name the model's inputs.")
    return entries


def _refuse_foreign(start: bytes) -> None:
    for magic, what in _FOREIGN.items():
        if start.startswith(magic) and not (magic == b"\x80" and start[1:2] not in b"\x02\x03\x04\x05"):
            raise BadCalibration(
                f"calibration tensors must be safetensors. Got {what}. "
                "Save them with safetensors.torch.save_file."
            )


def _parse_header(text: bytes, base: int, size: int) -> tuple[TensorEntry, ...]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except BadCalibration:
        raise
    except (ValueError, RecursionError) as error:
        raise BadCalibration(f"a safetensors header must be JSON. Got {error!s:.200}.") from None
    if not isinstance(header, dict):
        raise BadCalibration("a safetensors header must be a JSON object.")
    entries = [_entry(name, value, base) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = base
    for entry in entries:
        if entry.start != position or entry.stop > size:
            raise BadCalibration(f"tensor {entry.name!r} must lie inside the file, without gap or overlap.")
        position = entry.stop
    return tuple(sorted(entries, key=lambda entry: entry.name))


def _without_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    fields: dict[str, Json] = {}
    for name, value in pairs:
        if name in fields:
            raise BadCalibration(f"names of tensors must be unique. Got {name!r} twice.")
        fields[name] = value
    return fields


def _entry(name: str, value: Json, base: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype = fields.get("dtype")
    if dtype not in _DTYPE_BYTES:
        known = ", ".join(_DTYPE_BYTES)
        raise BadCalibration(f"dtype of tensor {name!r} must be one of {known}. Got {dtype!r}.")
    shape, offsets = (
        _whole_numbers(name, fields.get("shape")),
        _whole_numbers(name, fields.get("data_offsets")),
    )
    if len(offsets) != 2:
        raise BadCalibration(f"tensor {name!r} must have two offsets. Got {len(offsets)}.")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise BadCalibration(
            f"tensor {name!r} must fill its bytes. Got shape {shape} of {dtype} in {offsets}."
        )
    return TensorEntry(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _whole_numbers(name: str, value: Json) -> list[int]:
    if isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value):
        return value
    raise BadCalibration(
        f"tensor {name!r} must have a shape and offsets of whole numbers. Got {value!r:.80}."
    )


def _safetensors_facts(file: Path) -> dict[str, Json]:
    entries = read_header(file)
    rows = _common_rows(entries)
    for entry in entries:
        _require_finite(file, entry)
    names = {entry.name: {"dtype": entry.dtype, "shape": list(entry.shape)} for entry in entries}
    if set(names) == {LABELS}:
        raise BadCalibration("calibration data must hold the model's inputs. Got only labels.")
    return {"kind": "safetensors", "rows": rows, "tensors": names, "has_labels": LABELS in names}


def _common_rows(entries: tuple[TensorEntry, ...]) -> int:
    first = entries[0]
    for entry in entries:
        if not entry.shape:
            raise BadCalibration(
                f"tensor {entry.name!r} must have one row per sample. Got a scalar."
            )
        if entry.shape[0] != first.shape[0]:
            raise BadCalibration(
                f"all tensors must have the same first dimension. Got {first.shape[0]} in {first.name!r} "
                f"and {entry.shape[0]} in {entry.name!r}."
            )
        if 0 in entry.shape[1:]:
            raise BadCalibration(f"tensor {entry.name!r} must not be empty. Got shape {list(entry.shape)}.")
    require_enough_samples(first.shape[0])
    return first.shape[0]


def require_enough_samples(count: int, hint: str = "Send more data.") -> None:
    """Raises BadCalibration when three parts of two samples cannot be made."""
    if count < LEAST_SAMPLES:
        raise BadCalibration(
            f"calibration data must hold at least {LEAST_SAMPLES} samples: two for each of the parts "
            f"{', '.join(PARTS)}. Got {count}. {hint}"
        )


def _require_finite(file: Path, entry: TensorEntry) -> None:
    if entry.dtype not in _EXPONENT:
        return
    row = next(_rows_not_finite(file, entry), None)
    if row is not None:
        raise BadCalibration(
            f"values of tensor {entry.name!r} must be finite. Got NaN or infinity in row {row}."
        )


def _rows_not_finite(file: Path, entry: TensorEntry) -> Iterator[int]:
    """Rows with a value whose exponent bits are all set, read in chunks of bounded size."""
    unsigned, mask = _EXPONENT[entry.dtype]
    per_row = max(1, math.prod(entry.shape[1:]))
    count = math.prod(entry.shape)
    with file.open("rb") as stream:
        stream.seek(entry.start)
        for begin in range(0, count, _CHUNK):
            amount = min(_CHUNK, count - begin)
            bits: NDArray[Any] = np.frombuffer(
                stream.read(amount * _DTYPE_BYTES[entry.dtype]), dtype=unsigned
            )
            bad = np.flatnonzero((bits & bits.dtype.type(mask)) == mask)
            if len(bad):
                yield int((begin + bad[0]) // per_row)


# -- text -----------------------------------------------------------------------------------------


def iterate_rows(file: Path, kind: str) -> Iterator[str | list[dict[str, str]]]:
    """The texts (or lists of messages) of a file, one row at a time. Raises BadCalibration naming the row."""
    rows = 0
    for number, line in _lines(file):
        if line.strip():
            rows += 1
            yield line if kind == "text" else _jsonl_row(number, line)
    if rows == 0:
        raise BadCalibration(f"{file.name} must hold at least one row of text. Got an empty file.")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as stream:
        _refuse_foreign(stream.read(8))
        stream.seek(0)
        number = 0
        while raw := stream.readline(MOST_LINE_CHARACTERS):
            number += 1
            if len(raw) >= MOST_LINE_CHARACTERS:
                raise BadCalibration(f"row {number} must be shorter than {MOST_LINE_CHARACTERS} bytes.")
            yield number, _decoded(number, raw)


def _decoded(number: int, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadCalibration(f"row {number} must be UTF-8. Got {error}.") from None
    if "\0" in text:
        raise BadCalibration(f"row {number} must be text. Got a NUL character.")
    return text


def _jsonl_row(number: int, line: str) -> str | list[dict[str, str]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadCalibration(f"row {number} must be a JSON object. Got {error!s:.200}.") from None
    if not isinstance(row, Mapping) or ("text" in row) == ("messages" in row):
        raise BadCalibration(f'row {number} must be an object with either "text" or "messages".')
    if "text" in row:
        return _text_of(number, row["text"])
    return _messages_of(number, row["messages"])


def _require_encodable(number: int, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadCalibration(f"row {number} must be Unicode text. Got {error}.") from None
    return text


def _text_of(number: int, text: Json) -> str:
    if not isinstance(text, str) or not text.strip():
        raise BadCalibration(f'"text" of row {number} must be a string that is not empty. Got {text!r:.80}.')
    return _require_encodable(number, text)


def _messages_of(number: int, messages: Json) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadCalibration(f'"messages" of row {number} must be a list that is not empty.')
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise BadCalibration(f'each message of row {number} must have a "role" and a "content" string.')
    return [
        {key: _require_encodable(number, message[key]) for key in ("role", "content")} for message in messages
    ]
