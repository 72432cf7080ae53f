"""Texts of a Parquet file as JSON lines, read by a process of its own.

Apache Arrow is a large library of C++, and the file is a stranger's: the process that reads it has no
network, no data directory, and limits on memory and CPU time. What it writes is judged like any other JSON
lines, so nothing else needs Arrow.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from service.errors import Unavailable, Unprocessable
from service.executors.confine import Isolation
from service.executors.worker_process import NOT_ISOLATED, environment
from service.ingest.parquet_reader import NOT_CONFINED, REFUSED

READER = "service.ingest.parquet_reader"
MEMORY_BYTES = 2 * 2**30
CPU_SECONDS = 60
LARGEST_FILE = 2**30
LEAST_ROOM, MOST_EXPANSION, MOST_TEXT = 256 * 2**20, 20, 2**30
"""The lines may have so many bytes, or so many times those of the file, but no more than the last."""
LONGEST_WORD = 2000
_CHUNK = 2**20
_turns = threading.BoundedSemaphore(2)
PATIENCE_SECONDS = 5.0
"""How long a request waits for its turn: a thread that waits answers nobody else."""


def require_pyarrow(what: str, instead: str, pointer: str) -> None:
    """Raise Unprocessable `parquet-not-installed` where the library is missing."""
    if find_spec("pyarrow") is None:
        raise Unprocessable(
            "parquet-not-installed",
            f"{what} must find the library pyarrow. Got none. {instead}, or have the operator install "
            "bitplan[parquet].",
            pointer=pointer,
        )


def jsonl_of(path: Path, name: str, isolation: Isolation) -> Iterator[bytes]:
    """The rows of a Parquet file with a column `text` or `messages`, and `context` where there is one.

    The same file gives the same bytes. Raises Unprocessable `invalid-calibration` and
    `parquet-not-installed`, and Unavailable `not-isolated` and `too-many-readers`, in the middle too; `name`
    is what the sender calls the file.
    """
    require_pyarrow("Calibration data in a Parquet file", "Send jsonl", "/files/0")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise _invalid(name, f"have at most {LARGEST_FILE} bytes. Got {size}. Send fewer rows")
    most, begun = min(max(LEAST_ROOM, MOST_EXPANSION * size), MOST_TEXT), 0
    with (
        _turn(),
        path.open("rb") as file,
        tempfile.TemporaryFile() as said,
        _started(file, said, isolation) as process,
    ):
        try:
            assert process.stdout is not None, "it is a pipe"
            while chunk := process.stdout.read(_CHUNK):
                begun += len(chunk)
                if begun > most:
                    raise _invalid(name, f"hold at most {most} bytes of text. Got more. Send fewer rows")
                yield chunk
            _require_end(process.wait(), name, said)
        finally:
            process.kill()


@contextmanager
def _turn() -> Iterator[None]:
    """One of the few that read at a time. Raises Unavailable."""
    if not _turns.acquire(timeout=PATIENCE_SECONDS):
        raise Unavailable(
            "too-many-readers",
            "A server must read few Parquet files at a time. Got one more. Try again, or send jsonl.",
            headers={"Retry-After": "10"},
        )
    try:
        yield
    finally:
        _turns.release()


def _started(file: BinaryIO, said: BinaryIO, isolation: Isolation) -> subprocess.Popen[bytes]:
    limited = Isolation(isolation.mode, MEMORY_BYTES, CPU_SECONDS, file_bytes=_CHUNK, closed=isolation.closed)
    command = [sys.executable, "-P", "-m", READER, limited.as_json()]
    own = {**environment(1, os.environ), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    return subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=said, env=own)  # noqa: S603


def _require_end(code: int, name: str, said: Any) -> None:
    """Raise Unprocessable unless the process came to its end; Unavailable where it did not begin."""
    if code == 0:
        return
    said.seek(0)
    words = said.read(LONGEST_WORD).decode("utf-8", "replace")
    if code == NOT_CONFINED:
        raise Unavailable("not-isolated", NOT_ISOLATED.format(words))
    if code == REFUSED:
        raise _invalid(name, words)
    raise _invalid(
        name,
        f"be a Parquet file that can be read within {CPU_SECONDS} s and {MEMORY_BYTES} bytes of memory. "
        f"Got one whose reader ended with {code}. Send jsonl",
    )


def _invalid(name: str, must: str) -> Unprocessable:
    return Unprocessable("invalid-calibration", f"{name} must {must}.", pointer="/files/0")
