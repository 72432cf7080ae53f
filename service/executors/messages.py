"""Units and results as bytes and back: JSON and npz, never pickle, because a worker may have loaded a hostile
model.
"""

import errno
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from sensitivity.units import BlockUnit, ScoreRow, Unit, UnitResult, unit_from_json
from service.executors.protocol import Failure
from service.store.arrays import read_arrays, write_arrays

MAXIMUM_BYTES = 2**31 - 1


def pack(value: Mapping[str, Any]) -> bytes:
    """JSON without NaN and infinity. Raises ValueError for those."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def unpack(message: bytes) -> dict[str, Any]:
    """The inverse of `pack`."""
    value = json.loads(message)
    if not isinstance(value, dict):
        raise ValueError(f"A message must be an object. Got {type(value).__name__}.")
    return value


def pack_unit(unit: Unit) -> tuple[bytes, bytes]:
    """The unit's JSON, and the arrays that a block is given."""
    given = unit.given if isinstance(unit, BlockUnit) else {}
    return pack(unit.as_json()), _pack_arrays(given)


def unpack_unit(head: bytes, arrays: bytes) -> Unit:
    """The inverse of `pack_unit`."""
    unit = unit_from_json(unpack(head))
    given = read_arrays(io.BytesIO(arrays))
    return replace(unit, given=given) if isinstance(unit, BlockUnit) else unit


def pack_result(result: UnitResult) -> tuple[bytes, bytes]:
    """The scores and facts, and the arrays. Raises ValueError when a number is not finite."""
    rows = [[row.layer, row.scheme, row.metric, row.value, row.stderr, row.samples] for row in result.scores]
    return pack({"scores": rows, "facts": dict(result.facts)}), _pack_arrays(result.arrays)


def unpack_result(head: bytes, arrays: bytes) -> UnitResult:
    """The inverse of `pack_result`."""
    value = unpack(head)
    scores = tuple(
        ScoreRow(layer, scheme, metric, float(number), None if stderr is None else float(stderr), samples)
        for layer, scheme, metric, number, stderr, samples in value["scores"]
    )
    return UnitResult(scores=scores, arrays=read_arrays(io.BytesIO(arrays)), facts=value["facts"])


def _pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    write_arrays(buffer, arrays)
    return buffer.getvalue()


def failure_of(error: BaseException, kind: str) -> Failure:
    """An exception as a failure of `kind` "bad_input" or "unit_error", unless memory was what it lacked."""
    name = getattr(error, "kind", None) or type(error).__name__
    message = str(error) or type(error).__name__
    if _lacked_memory(error):
        return Failure("out_of_memory", f"Memory must suffice for the unit. {message}", {"error": name})
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        said = f"Files of a worker must stay within BITPLAN_WORKER_FILE. Got one beyond it: {message}"
        return Failure("unit_error", said, {"error": "file_size"})
    return Failure("bad_input" if kind == "bad_input" else "unit_error", message, {"error": name})


def _lacked_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
