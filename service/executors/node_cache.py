"""Models and calibration files on a node of a cluster: fetched once, verified, swept by their last use."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from quant.digest import ManifestEntry, manifest_digest
from service.store import views
from service.store.blobs import is_digest
from service.store.durable import READ_ONLY, make_folder, sync_file, touch
from service.store.errors import StoreError

Kind = Literal["model", "data"]
RESERVE_BYTES = 256 * 2**20
"""Left free on the node's disk."""
DATA = "data"
"""The name of a calibration file in its folder."""


class CacheFull(StoreError):  # noqa: N818 - says what happened
    """The node has no room for this, even after everything that is not in use is gone."""


class NotWhatWasAsked(StoreError):  # noqa: N818 - says what happened
    """The bytes that came are not those that the digest names."""


@dataclass(frozen=True)
class Coming:
    """A file that will be sent: plain name and size in bytes."""

    name: str
    size: int


class NodeCache:
    """Folders named by the digest of what they hold, read-only, each whole or absent.

    Who uses or fetches one holds a lock of its own on it, which ends with his process; nothing that
    somebody holds is swept. Used by several processes at once.

    limit_bytes   of all of it; what was used least recently goes first. None for no limit but the disk
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None):
        self.folder, self._limit = folder, limit_bytes
        for name in ("entries", "coming", "locks"):
            make_folder(folder / name)
        self._held: dict[str, int] = {}

    def path(self, digest: str) -> Path:
        """Where it is, or would be. Raises StoreError for what is no digest."""
        if not is_digest(digest):
            raise StoreError(f"A digest must be 64 lowercase hexadecimal digits. Got {digest!r}.")
        return self.folder / "entries" / digest

    def hold(self, digest: str) -> bool:
        """Whether it is here; then it stays until `release` or the end of the process."""
        entry = self.path(digest)
        if digest not in self._held:
            descriptor = self._open_lock(digest)
            if not _locked(descriptor, fcntl.LOCK_SH) or not entry.is_dir():
                os.close(descriptor)
                return False
            self._held[digest] = descriptor
        touch(entry)
        return True

    def holds(self, digest: str) -> bool:
        """Whether `hold` or a fetch of this process has it."""
        return digest in self._held

    def fetch(self, digest: str) -> Arrival | None:
        """Begin to receive it; None while another process does."""
        self.path(digest)
        descriptor = self._open_lock(digest)
        if not _locked(descriptor, fcntl.LOCK_EX):
            os.close(descriptor)
            return None
        return Arrival(self, digest, descriptor)

    def release(self) -> None:
        """Let go of everything."""
        while self._held:
            os.close(self._held.popitem()[1])

    def make_room(self, size: int) -> None:
        """Sweep until `size` more bytes fit: first what dead processes left half. Raises `CacheFull`."""
        for folder in (*self._folders("coming"), *sorted(self._folders("entries"), key=_used)):
            if self._fits(size):
                return
            self._remove(folder)
        if not self._fits(size):
            raise CacheFull(
                f"The cache of a node must have room for {size:,} bytes. Got {self._free():,} free on the"
                f" disk of {self.folder} and a limit of {self._limit or 'none'}. Make room, or raise"
                " BITPLAN_RAY_CACHE_LIMIT."
            )

    def _keep(self, digest: str, descriptor: int) -> None:
        """Go on with the lock of a fetch as one that others share."""
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        self._held[digest] = descriptor

    def _fits(self, size: int) -> bool:
        used = sum(_size(folder) for folder in (self.folder / "entries", self.folder / "coming"))
        within = self._limit is None or used + size <= self._limit
        return within and self._free() >= size + RESERVE_BYTES

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _folders(self, kind: Literal["entries", "coming"]) -> list[Path]:
        return [folder for folder in (self.folder / kind).iterdir() if is_digest(folder.name)]

    def _remove(self, folder: Path) -> None:
        """Remove it unless somebody holds or fetches it."""
        if folder.name in self._held:
            return
        descriptor = self._open_lock(folder.name)
        try:
            if _locked(descriptor, fcntl.LOCK_EX):
                views.remove(folder)
        finally:
            os.close(descriptor)

    def _open_lock(self, digest: str) -> int:
        return os.open(self.folder / "locks" / digest, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


class Arrival:
    """What is being received: `expect`, then `receive` piece after piece in the order of the files, then
    `finish` or `drop`. Constant memory; nothing is visible before it is whole and verified.
    """

    def __init__(self, cache: NodeCache, digest: str, lock: int):
        self._cache, self._digest, self._lock = cache, digest, lock
        self._folder = cache.folder / "coming" / digest
        views.remove(self._folder)
        self._coming: list[Coming] = []
        self._got: list[ManifestEntry] = []
        self._file: BinaryIO | None = None
        self._hasher, self._size = hashlib.sha256(), 0

    def expect(self, files: Sequence[Coming]) -> None:
        """Say what will come. Raises `CacheFull`, and StoreError for names that are not plain."""
        for file in files:
            views.plain_path(file.name)
        self._cache.make_room(sum(file.size for file in files))
        self._folder.mkdir()
        self._coming = list(files)
        self._open_next()

    def receive(self, piece: bytes) -> None:
        """The next bytes; a piece belongs to one file. Raises `NotWhatWasAsked` for more than was said."""
        if self._file is None:
            raise NotWhatWasAsked(f"{self._digest} must end after its last file. Got more bytes.")
        self._hasher.update(piece)
        self._file.write(piece)
        self._size += len(piece)
        self._close_whole()

    def finish(self, kind: Kind) -> Path:
        """Verify it and make it visible. Raises `NotWhatWasAsked`."""
        found = manifest_digest(self._got) if kind == "model" else self._got[0]["sha256"]
        if self._file is not None or found != self._digest:
            raise NotWhatWasAsked(
                f"What a node receives must have the digest {self._digest}. Got {found}: the {kind} was"
                " changed where the runner reads it. Send it again."
            )
        views.publish_folder(self._folder, self._cache.path(self._digest))
        self._cache._keep(self._digest, self._lock)
        return self._cache.path(self._digest)

    def drop(self) -> None:
        """Forget what has come."""
        if self._file is not None:
            self._file.close()
        views.remove(self._folder)
        os.close(self._lock)

    def _open_next(self) -> None:
        """The next file; an empty one is whole at once."""
        if self._coming:
            place = self._folder / self._coming[0].name
            place.parent.mkdir(parents=True, exist_ok=True)
            self._file = place.open("xb")
            self._hasher, self._size = hashlib.sha256(), 0
            self._close_whole()

    def _close_whole(self) -> None:
        coming, file = self._coming[0], self._file
        if file is None or self._size < coming.size:
            return
        if self._size > coming.size:
            raise NotWhatWasAsked(f"{coming.name} must have {coming.size} bytes. Got more.")
        sync_file(file)
        file.close()
        (self._folder / coming.name).chmod(READ_ONLY)
        entry: ManifestEntry = {
            "path": coming.name,
            "size": coming.size,
            "sha256": self._hasher.hexdigest(),
        }
        self._got.append(entry)
        self._coming.pop(0)
        self._file = None
        self._open_next()


def send(
    files: Sequence[tuple[str, Path]],
    sizes: Sequence[Coming],
    receive: Callable[[bytes], None],
    piece_bytes: int,
) -> None:
    """Read the files piece by piece into `receive`; as many bytes of each as `sizes` says."""
    for (_, path), coming in zip(files, sizes, strict=True):
        left = coming.size
        with path.open("rb") as file:
            while left and (piece := file.read(min(piece_bytes, left))):
                left -= len(piece)
                receive(piece)
        if left:
            raise NotWhatWasAsked(f"{coming.name} must have {coming.size} bytes. Got {left} fewer.")


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _used(entry: Path) -> float:
    """When it was used last; long ago if somebody has swept it meanwhile."""
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except FileNotFoundError:  # swept by somebody else meanwhile
                continue
    return total
