"""Files that are either whole or absent, also after a power cut."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

READ_ONLY = 0o444


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: BinaryIO) -> None:
    """Make the content of an open file durable."""
    file.flush()
    os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def touch(path: Path) -> None:
    """Make a file or folder of ours, read-only or not, as young as can be."""
    os.utime(path)


def publish(temporary: Path, final: Path) -> None:
    """Give a synced temporary file its final name; a file that is already there has the same content and
    stays. Either way it is young now, which `service.retention` goes by.
    """
    make_folder(final.parent)
    temporary.chmod(READ_ONLY)
    if final.exists():
        touch(final)
        temporary.unlink()
        return
    touch(temporary)
    temporary.replace(final)
    sync_folder(final.parent)


@contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file under a name that nobody else has; it is removed unless it was published."""
    make_folder(folder)
    path = folder / uuid.uuid4().hex
    try:
        with path.open("xb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)
