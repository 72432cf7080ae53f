"""A model folder on the server itself: only inside the operator's allow-list, only plain files."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from service.errors import NotFound, ServiceError, Unprocessable
from service.ingest.kinds import is_model_file, refusal
from service.ingest.weights import LARGEST_INDEX, choose


def allowed_folder(folder: str, allowed: Sequence[Path]) -> Path:
    """The folder, which must lie inside one of `allowed` after every link is followed."""
    if not allowed:
        raise Unprocessable(
            "folders-not-offered",
            "Server-side folders must be allowed by BITPLAN_MODEL_FOLDERS. Got none allowed. Upload the "
            "model instead.",
            pointer="/folder",
        )
    path = Path(os.path.realpath(folder.replace("\0", "")))
    if (
        "\0" in folder
        or not Path(folder).is_absolute()
        or not any(path.is_relative_to(os.path.realpath(root)) for root in allowed)
    ):
        raise Unprocessable(
            "folder-not-allowed",
            f"folder must be an absolute path inside {', '.join(map(str, allowed))}. Got {folder[:200]!r}. "
            "Upload the model instead, or ask the operator.",
            pointer="/folder",
        )
    if not os.path.isdir(path):  # false, too, for a name that is longer than names may be
        raise NotFound(
            "folder-not-found",
            f"folder must exist on the server. Got {folder[:200]!r}. Check it.",
            pointer="/folder",
        )
    return path


def model_files_in(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files that take part, and names of weights that do not, where an index or a single file covers the
    model without them; links, pipes and programs are refused, other plain files are passed over.
    """
    found = sorted(folder.iterdir())
    for path in found:
        if not is_model_file(path.name):
            if path.suffix in {".py", ".bin", ".pt", ".pth"}:
                raise refusal(path.name, "/folder", "those of a safetensors checkpoint")
            continue
        _require_plain(path.name, path.lstat())
    chosen = choose(
        [path.name for path in found if is_model_file(path.name)], lambda name: _read(folder / name)
    )
    return tuple(folder / name for name in chosen.kept), chosen.left_out


def _read(path: Path) -> bytes:
    with open_plain(path) as file:
        return file.read(LARGEST_INDEX + 1)


def open_plain(path: Path) -> BinaryIO:
    """Open a file that must not have become a link, pipe or device since it was looked at."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _require_plain(path.name, os.fstat(descriptor))
    except ServiceError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _require_plain(name: str, found: os.stat_result) -> None:
    """A second name (hard link) may be of a file outside the folder, as a symbolic link may."""
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise Unprocessable(
            "invalid-path",
            f"Files of a model folder must be plain files with one name. Got {name!r}, a link, pipe or "
            "device. Copy the file.",
            pointer="/folder",
        )
