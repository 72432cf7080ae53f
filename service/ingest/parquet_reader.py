"""The process that reads a stranger's Parquet file: it confines itself, then writes a JSON line per row.

``python -m service.ingest.parquet_reader ISOLATION < FILE``. Nothing that starts threads may be imported
before it is confined.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from service.executors.confine import Isolation, confine, limit_cpu

CONTENTS = ("text", "messages")
CONTEXT = "context"
BATCH_ROWS, MOST_ROWS = 64, 1_000_000
REFUSED = 3
"""The exit code of a process that says on stderr what the file must do or be."""
NOT_CONFINED = 4
"""The exit code of one that says what it would not be kept from, and has read nothing."""


def _write_lines(source: Any, sink: BinaryIO) -> None:
    """One line per row. Raises ValueError that says what the file must be."""
    import pyarrow
    from pyarrow import parquet

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    try:
        table = parquet.ParquetFile(source, pre_buffer=False)
        columns = _columns(table.schema_arrow.names)
        rows = 0
        for batch in table.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            rows += len(batch)
            if rows > MOST_ROWS:
                raise ValueError(f"have at most {MOST_ROWS} rows. Got more. Send fewer")
            for row in batch.to_pylist():
                sink.write(_line(row))
    except (pyarrow.ArrowException, OSError, OverflowError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"be a Parquet file of texts. Got {error!s:.300}") from None


def _columns(names: list[str]) -> list[str]:
    found = [name for name in CONTENTS if name in names]
    if len(found) != 1 or len(set(names)) < len(names):
        got = ", ".join(names[:20]) or "none"
        raise ValueError(f"have a column text, or one messages, and each column once. Got {got:.300}")
    return [*found, *(name for name in (CONTEXT,) if name in names)]


def _line(row: Mapping[str, Any]) -> bytes:
    kept = {name: value for name, value in row.items() if name != CONTEXT or value is not None}
    return json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def main(isolation: Isolation) -> None:
    """Confine this process, then write the lines of the file that is its standard input."""
    gaps = confine(isolation)
    if gaps and isolation.mode == "require":
        sys.stderr.write("; ".join(gaps))
        sys.exit(NOT_CONFINED)
    limit_cpu(isolation.cpu_seconds)
    try:
        with os.fdopen(0, "rb") as source, os.fdopen(1, "wb") as sink:
            _write_lines(source, sink)
    except ValueError as error:
        sys.stderr.write(str(error))
        sys.exit(REFUSED)


if __name__ == "__main__":
    main(Isolation.from_json(sys.argv[1]))
