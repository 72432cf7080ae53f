"""Scores as one Parquet file, written row group by row group: no more than one is in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from service.api.resources import Json

MEDIA_TYPE = "application/vnd.apache.parquet"
GROUP_ROWS = 50_000


def parquet(rows: Iterator[Json], columns: Sequence[str]) -> Iterator[bytes]:
    """The bytes of the file: names as texts, `samples` as int64, all else as doubles, or null."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([(name, _type(pyarrow, name)) for name in columns])
    sink = _Sink()
    with ParquetWriter(sink, schema, compression="zstd") as writer:
        while group := list(islice(rows, GROUP_ROWS)):
            values = {name: [row[name] for row in group] for name in columns}
            writer.write_table(pyarrow.table(values, schema=schema))
            yield sink.taken()
    yield sink.taken()


def _type(pyarrow: Any, name: str) -> Any:
    if name in ("layer", "scheme", "metric"):
        return pyarrow.string()
    return pyarrow.int64() if name == "samples" else pyarrow.float64()


class _Sink(io.RawIOBase):
    """A file that is only written to; what was written is taken away from time to time."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any, /) -> int:
        """Keep it until it is taken."""
        piece = bytes(data)
        self._pieces.append(piece)
        self._size += len(piece)
        return len(piece)

    def tell(self) -> int:
        """All bytes so far, taken or not."""
        return self._size

    def taken(self) -> bytes:
        """What was written since."""
        found, self._pieces = b"".join(self._pieces), []
        return found
