"""The key that a client sends: given, in a file, or in the environment."""

from __future__ import annotations

import os
from pathlib import Path

from service.access import prefix_of

VARIABLE, FILE_VARIABLE = "BITPLAN_KEY", "BITPLAN_KEY_FILE"


def find_key(key: str | None = None, file: str | Path | None = None) -> str | None:
    """`key`, else what is in `file`, in BITPLAN_KEY, or in the file that BITPLAN_KEY_FILE names; None where
    nothing of them is given.

    Raises ValueError for what has not the form of a key (and does not repeat it), OSError for a file that
    cannot be read.
    """
    if key is not None:
        return _checked(key, "key")
    if file is not None:
        return _read(Path(file))
    if found := os.environ.get(VARIABLE):
        return _checked(found, VARIABLE)
    if named := os.environ.get(FILE_VARIABLE):
        return _read(Path(named))
    return None


def _read(path: Path) -> str:
    return _checked(path.read_text(encoding="utf-8"), str(path))


def _checked(text: str, where: str) -> str:
    token = text.strip()
    if prefix_of(token) is None:
        raise ValueError(
            f"{where} must hold a key of `bitplan keys create`: bitplan_, 12 digits, _, 43 characters. "
            f"Got {len(token)} characters of another form. Copy the whole key."
        )
    return token
