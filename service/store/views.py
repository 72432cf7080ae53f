"""Read-only folders made of blobs."""

import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from service.store.durable import make_folder, sync_folder
from service.store.errors import UnsafePath

FOLDER_MODE = 0o555
WRITABLE_FOLDER_MODE = 0o755


def materialize(entries: Iterable[tuple[str, Path]], folder: Path) -> Path:
    """Make `folder` hold a hard link (or copy) of each file under its name; a folder that exists is
    complete.
    """
    if folder.is_dir():
        return folder
    make_folder(folder.parent)
    growing = folder.parent / f".{uuid.uuid4().hex}"
    growing.mkdir()
    try:
        for name, source in entries:
            _place(source, growing / plain_path(name))
        publish_folder(growing, folder)
    finally:
        remove(growing)
    return folder


def publish_folder(growing: Path, folder: Path) -> None:
    """Make a folder of ours read-only and durable, and give it its final name; one that is there stays."""
    _seal(growing)
    _publish(growing, folder)


def plain_path(name: str) -> PurePosixPath:
    """The relative path that a manifest names. Raises `UnsafePath` for anything that could lead elsewhere.

    >>> str(plain_path("shards/a.safetensors"))
    'shards/a.safetensors'
    """
    parts = name.split("/")
    odd = any(character in name for character in "\\:\0") or any(part in ("", ".", "..") for part in parts)
    if odd:
        raise UnsafePath(f"A path must be plain and relative. Got {name!r}. Send names like config.json.")
    return PurePosixPath(name)


def remove(folder: Path) -> None:
    """Remove a read-only folder, if it is there."""
    if not folder.is_dir():
        return
    for root, _, _ in os.walk(folder):
        Path(root).chmod(WRITABLE_FOLDER_MODE)
    shutil.rmtree(folder)


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        raise UnsafePath(f"A manifest must name each path once. Got {target.name!r} twice.") from None
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(0o444)


def _seal(folder: Path) -> None:
    for root, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(root))
        if Path(root) != folder:
            Path(root).chmod(FOLDER_MODE)


def _publish(growing: Path, folder: Path) -> None:
    try:
        growing.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        return
    folder.chmod(FOLDER_MODE)
    sync_folder(folder.parent)
