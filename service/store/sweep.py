"""Old files of a data directory: which there are, and their removal. What is young is never touched."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.store import views
from service.store.blobs import is_digest, lock_of
from service.store.durable import temporary_file
from service.store.lock import alone

PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Old:
    """A file, or a folder with all its files: its size in bytes, and what its path says it is."""

    path: Path
    size: int
    tenant: str = ""
    name: str = ""


def clock(data_dir: Path) -> float:
    """Seconds since 1970 by the clock that gives files their times, which may be that of another host."""
    with temporary_file(data_dir / "tmp") as (path, _):
        return path.stat().st_mtime


def old_blobs(data_dir: Path, before: float) -> Iterator[Old]:
    """Blobs of all tenants that nobody has added since."""
    for path in (data_dir / "blobs").glob("*/??/*"):
        if is_digest(path.name) and (found := _old(path, before)) is not None:
            yield Old(path, found.size, path.parts[-3], path.name)


def old_partials(data_dir: Path, before: float) -> Iterator[Old]:
    """Folders of uploads that have received nothing since; `name` is the upload's id."""
    for path in (data_dir / "partials").glob("*/*"):
        if (found := _old(path, before)) is not None:
            yield Old(path, found.size, path.parts[-2], path.name)


def old_views(data_dir: Path, before: float) -> Iterator[Old]:
    """Folders made of blobs that nobody has opened since; `name` is a model's digest, or begins with a dot.
    Their size is that of their own files: links to blobs that are still there take no room.
    """
    for path in (data_dir / "views").glob("*/*"):
        if _time(path) < before:
            own = sum(_links(file) for file in path.rglob("*"))
            yield Old(path, own, path.parts[-2], path.name)


def old_logs(data_dir: Path, before: float) -> Iterator[Old]:
    """What workers printed; `name` is ``worker-PID-SLOT``."""
    for path in (data_dir / "logs").glob("worker-*.log"):
        if (found := _old(path, before)) is not None:
            yield Old(path, found.size, "", path.stem)


def old_temporaries(data_dir: Path, before: float) -> Iterator[Old]:
    """What crashes left behind; `name` tells a job's folder: ``checkpoint-JOB-EPOCH``."""
    for path in (data_dir / "tmp").glob("*"):
        if (found := _old(path, before)) is not None:
            yield Old(path, found.size, "", path.name)


def remove_blob(data_dir: Path, path: Path, before: float) -> bool:
    """Remove a blob, unless somebody has added it again or a backup copies the store at this moment."""
    with alone(lock_of(data_dir), PATIENCE_SECONDS) as mine:
        if not mine or _time(path) >= before:
            return False
        path.unlink(missing_ok=True)
    return True


def remove_view(data_dir: Path, path: Path, before: float) -> bool:
    """Remove a folder made of blobs, unless somebody has opened it again; it vanishes at once, as a whole."""
    with alone(lock_of(data_dir), PATIENCE_SECONDS) as mine:
        if not mine or _time(path) >= before:
            return False
        gone = path if path.name.startswith(".") else path.with_name(f".{path.name}")
        path.rename(gone)
    views.remove(gone)
    return True


def remove_partial(path: Path, before: float) -> bool:
    """Remove what has arrived of an upload, unless a request writes it at this moment."""
    for file in path.glob("*"):
        with suppress(FileNotFoundError), file.open("r+b") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if _time(file) >= before:
                return False
            file.unlink()
    with suppress(OSError):
        path.rmdir()
    return not path.exists()


def remove(path: Path) -> bool:
    """Remove a file or folder of ours that nobody shares."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not path.exists()


def _old(path: Path, before: float) -> Old | None:
    """The file or folder, if nothing of it was written since."""
    parts = [path, *path.rglob("*")] if path.is_dir() else [path]
    if not all(_time(part) < before for part in parts):
        return None
    return Old(path, sum(_size(part) for part in parts))


def _time(path: Path) -> float:
    """When it was written; what is gone was never old."""
    try:
        return os.lstat(path).st_mtime
    except FileNotFoundError:
        return float("inf")


def _size(path: Path) -> int:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0
    return 0 if path.is_dir() else found.st_size


def _links(path: Path) -> int:
    """The bytes of a file that has no other name."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0
    return found.st_size if found.st_nlink == 1 and not path.is_dir() else 0
