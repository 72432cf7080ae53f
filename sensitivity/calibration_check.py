"""Checks of a calibration file that need neither torch nor the model. Front: numpy only.

What only the model can tell (names of inputs, size of the vocabulary) sensitivity/calibration.py checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.safetensors_header import DTYPE_BYTES, HeaderError, TensorEntry, read_header
from sensitivity import npz
from sensitivity.errors import BadCalibration
from sensitivity.spec import PARTS, Json
from sensitivity.text_rows import iterate_rows, refuse_foreign

LABELS = "labels"
SIGNAL = "alphas_cumprod"
"""Share of the signal in each noisy image, as schedulers of diffusers call it."""
CONTEXT = "context"
"""The class of each sample, for scores by context."""
EXTRAS = (SIGNAL, CONTEXT)
"""Tensors that describe the samples to the task, unless the model has an input of that name."""
LEAST_SAMPLES = 2 * len(PARTS)
"""Two samples in each of the three parts: less has no standard error."""
SUFFIXES = {".safetensors": "safetensors", ".npz": "npz", ".txt": "text", ".jsonl": "jsonl"}
TENSOR_KINDS = ("safetensors", "npz")
"""Kinds of files that hold the model's inputs themselves; the others hold text."""
DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")
_CHUNK = 2**22
_EXPONENT = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
_EXPONENT |= {"F64": ("<u8", 0x7FF0000000000000)}


def check_calibration(path: str | Path, kind: str) -> dict[str, Json]:
    """Facts of a sound file: kind, rows, tensors {name: {dtype, shape}}, has_labels.

    Raises BadCalibration naming the tensor or the row.
    """
    file = Path(path)
    if not file.is_file():
        raise BadCalibration(f"calibration data must be a file. Got {file.name!r}, which is not one.")
    if kind in TENSOR_KINDS:
        return _tensor_facts(file, kind)
    if kind in ("text", "jsonl"):
        rows = sum(1 for _ in iterate_rows(file, kind))
        return {"kind": kind, "rows": rows, "tensors": {}, "has_labels": False}
    raise BadCalibration(f"kind must be one of {', '.join(SUFFIXES.values())}. Got {kind!r}.")


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


def _tensor_facts(file: Path, kind: str) -> dict[str, Json]:
    tensors = npz.read_entries(file) if kind == "npz" else read_tensors(file)
    rows = _common_rows(tensors)
    for name, entry in tensors.items():
        _require_finite(file, name, entry, kind)
    _require_classes(tensors.get(CONTEXT))
    if set(tensors) <= {LABELS, *EXTRAS}:
        raise BadCalibration(f"calibration data must hold the model's inputs. Got only {', '.join(tensors)}.")
    described = {name: {"dtype": entry.dtype, "shape": list(entry.shape)} for name, entry in tensors.items()}
    return {"kind": kind, "rows": rows, "tensors": described, "has_labels": LABELS in tensors}


def _require_classes(entry: TensorEntry | None) -> None:
    """A model's own input may have the name too, with more numbers per sample."""
    if entry is not None and len(entry.shape) == 1 and entry.dtype in _EXPONENT:
        raise BadCalibration(
            f"tensor {CONTEXT!r} must hold whole numbers, a class per sample. Got {entry.dtype}."
        )


def read_tensors(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, their header checked. Raises BadCalibration."""
    with file.open("rb") as stream:
        start = stream.read(8)
    refuse_foreign(start)
    try:
        tensors = dict(sorted(read_header(file).tensors.items()))
    except HeaderError as error:
        raise BadCalibration(str(error)) from error
    if not tensors:
        raise BadCalibration(f"{file.name} must hold at least one tensor. Got none: name the model's inputs.")
    for name, entry in tensors.items():
        if entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise BadCalibration(f"dtype of tensor {name!r} must be one of {known}. Got {entry.dtype!r}.")
    _require_gapless(tensors, len(start) + int.from_bytes(start, "little"), file.stat().st_size)
    return tensors


def _require_gapless(tensors: dict[str, TensorEntry], first: int, size: int) -> None:
    """Tensors must fill the bytes from `first` to `size`, one after the other."""
    position = first
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != position:
            raise BadCalibration(f"tensor {name!r} must follow the one before, without gap or overlap.")
        position = entry.start + entry.nbytes
    if position != size:
        raise BadCalibration(f"tensors must fill the file. Got {size - position} bytes after them.")


def _common_rows(tensors: dict[str, TensorEntry]) -> int:
    first_name, first = next(iter(tensors.items()))
    for name, entry in tensors.items():
        if not entry.shape:
            raise BadCalibration(f"tensor {name!r} must have one row per sample. Got a scalar.")
        if entry.shape[0] != first.shape[0]:
            raise BadCalibration(
                f"all tensors must have the same first dimension. Got {first.shape[0]} in {first_name!r} "
                f"and {entry.shape[0]} in {name!r}."
            )
        if 0 in entry.shape[1:]:
            raise BadCalibration(f"tensor {name!r} must not be empty. Got shape {list(entry.shape)}.")
    require_enough_samples(first.shape[0])
    return first.shape[0]


def require_enough_samples(count: int, hint: str = "Send more data.") -> None:
    """Raises BadCalibration when three parts of two samples cannot be made."""
    if count < LEAST_SAMPLES:
        raise BadCalibration(
            f"calibration data must hold at least {LEAST_SAMPLES} samples: two for each of the parts "
            f"{', '.join(PARTS)}. Got {count}. {hint}"
        )


def _require_finite(file: Path, name: str, entry: TensorEntry, kind: str) -> None:
    if kind == "npz":
        row = npz.first_row_not_finite(file, name)
    elif entry.dtype in _EXPONENT:
        row = next(_rows_not_finite(file, entry), None)
    else:
        return
    if row is not None:
        raise BadCalibration(f"values of tensor {name!r} must be finite. Got NaN or infinity in row {row}.")


def _rows_not_finite(file: Path, entry: TensorEntry) -> Iterator[int]:
    """Rows with a value whose exponent bits are all set, read in chunks of bounded size."""
    unsigned, mask = _EXPONENT[entry.dtype]
    per_row = max(1, math.prod(entry.shape[1:]))
    count = math.prod(entry.shape)
    with file.open("rb") as stream:
        stream.seek(entry.start)
        for begin in range(0, count, _CHUNK):
            amount = min(_CHUNK, count - begin)
            bits: NDArray[Any] = np.frombuffer(stream.read(amount * DTYPE_BYTES[entry.dtype]), dtype=unsigned)
            bad = np.flatnonzero((bits & bits.dtype.type(mask)) == mask)
            if len(bad):
                yield int((begin + bad[0]) // per_row)
