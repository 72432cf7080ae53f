"""A blob that arrives in pieces: append at the right offset, resume after an interruption, verify at the
end.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO

from service.store.durable import make_folder, publish, sync_file
from service.store.errors import BlobTooLarge, DigestMismatch, PartialBusy, WrongOffset
from service.store.lock import shared


class PartialWriter:
    """Takes the bytes of one request; `offset` is how far the upload has come."""

    def __init__(self, file: BinaryIO, offset: int, limit: int):
        self._file, self.offset, self._start, self._limit = file, offset, offset, limit

    def write(self, chunk: bytes) -> None:
        """Append. Raises `BlobTooLarge` beyond the announced size, after dropping what this request sent."""
        if self.offset + len(chunk) > self._limit:
            self._file.truncate(self._start)
            raise BlobTooLarge(self._limit)
        self._file.write(chunk)
        self.offset += len(chunk)


class PartialUpload:
    """The bytes of one blob that have arrived so far; made by `BlobStore.partial`."""

    def __init__(self, path: Path, final: Path, digest: str, lock: Path):
        self._path, self._final, self._digest, self._lock = path, final, digest, lock

    @property
    def offset(self) -> int:
        """How many bytes have arrived: where to go on."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def append(self, offset: int, size: int) -> Iterator[PartialWriter]:
        """Write on from `offset`, up to `size` bytes in all; what was written stays when the block raises.

        Raises `WrongOffset` (with the right one), `BlobTooLarge`, and `PartialBusy` while another request
        writes.
        """
        make_folder(self._path.parent)
        with self._locked() as file:
            reached = file.seek(0, os.SEEK_END)
            if offset != reached:
                raise WrongOffset(reached, offset)
            writer = PartialWriter(file, reached, size)
            try:
                yield writer
            finally:
                sync_file(file)

    def commit(self, size: int) -> Path:
        """Verify size and digest and make the blob visible. The wrong bytes are dropped, so that sending
        begins anew.

        Raises `WrongOffset` when bytes are missing, `DigestMismatch`, and `PartialBusy`.
        """
        make_folder(self._path.parent)
        with self._locked() as file:
            reached = file.seek(0, os.SEEK_END)
            if reached != size:
                raise WrongOffset(reached, size)
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self._digest:
                self._path.unlink()
                raise DigestMismatch(self._digest, found)
            with shared(self._lock):
                publish(self._path, self._final)
        return self._final

    def discard(self) -> None:
        """Forget what has arrived."""
        self._path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[BufferedRandom]:
        """The file, locked against other requests and processes; the lock dies with its process."""
        with self._path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PartialBusy(
                    "One request at a time must write an upload. Got a second. Try again."
                ) from None
            yield file
