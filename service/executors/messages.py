"""Results as bytes and back: JSON and npz, never pickle, because a worker may have loaded a hostile model."""

import io
import json
from collections.abc import Mapping
from typing import Any

from sensitivity.units import ScoreRow, UnitResult
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


def pack_result(result: UnitResult) -> tuple[bytes, bytes]:
    """The scores and facts, and the arrays. Raises ValueError when a number is not finite."""
    rows = [[row.layer, row.scheme, row.metric, row.value, row.stderr, row.samples] for row in result.scores]
    buffer = io.BytesIO()
    write_arrays(buffer, result.arrays)
    return pack({"scores": rows, "facts": dict(result.facts)}), buffer.getvalue()


def unpack_result(head: bytes, arrays: bytes) -> UnitResult:
    """The inverse of `pack_result`."""
    value = unpack(head)
    scores = tuple(
        ScoreRow(layer, scheme, metric, float(number), None if stderr is None else float(stderr), samples)
        for layer, scheme, metric, number, stderr, samples in value["scores"]
    )
    return UnitResult(scores=scores, arrays=read_arrays(io.BytesIO(arrays)), facts=value["facts"])


def failure_of(error: BaseException, kind: str) -> Failure:
    """An exception as a failure of `kind` "bad_input" or "unit_error", unless memory was what it lacked."""
    name = getattr(error, "kind", None) or type(error).__name__
    message = str(error) or type(error).__name__
    if _lacked_memory(error):
        return Failure("out_of_memory", f"Memory must suffice for the unit. {message}", {"error": name})
    return Failure("bad_input" if kind == "bad_input" else "unit_error", message, {"error": name})


def _lacked_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
