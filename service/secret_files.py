"""Values that stand in files instead of the environment: ``BITPLAN_X_FILE`` names the file of ``BITPLAN_X``.

A value is never repeated in a message, the path of its file is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

MOST_BYTES = 64 * 2**10


class SecretFileError(ValueError):
    """A variable names a file that gives no value."""


def named_files(names: Iterable[str], environment: Mapping[str, str]) -> dict[str, Path]:
    """The files that variables name, by the variable that they stand for; an empty name is none.

    Raises `SecretFileError` where a value is given in both ways.

    >>> named_files(["BITPLAN_KEY"], {"BITPLAN_KEY_FILE": "/run/secrets/key"})
    {'BITPLAN_KEY': PosixPath('/run/secrets/key')}
    """
    found = {}
    for name in names:
        file = environment.get(f"{name}_FILE")
        if file and environment.get(name):
            raise SecretFileError(
                f"{name} must be given once. Got {name}_FILE too, {file!r}. Unset one of the two."
            )
        if file:
            found[name] = Path(file)
    return found


def read_value(name: str, file: Path) -> str:
    """The one line that a file holds, without its end. Raises `SecretFileError`."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise SecretFileError(
            f"{name}_FILE must name a file that this user can read. Got {str(file)!r}: {error.strerror}. "
            "Correct the path or the file's mode, or mount the secret."
        ) from None
    if fault := _fault(content):
        raise SecretFileError(
            f"{name}_FILE must name a file with one line of UTF-8 text. Got {str(file)!r}, which {fault}. "
            "Write the value alone into it."
        )
    return content.decode().rstrip("\r\n")


def _fault(content: bytes) -> str:
    if len(content) > MOST_BYTES:
        return f"has more than {MOST_BYTES} bytes"
    try:
        value = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return "is not UTF-8"
    if not value.strip():
        return "is empty"
    if not value.isprintable():
        return "has several lines or control characters"
    return ""


class SecretFiles(PydanticBaseSettingsSource):
    """A source of pydantic-settings: every setting may stand in the file that its ``..._FILE`` names."""

    def __init__(self, settings: type[BaseSettings], prefix: str):
        super().__init__(settings)
        self._variables = {f"{prefix}{name.upper()}": name for name in settings.model_fields}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not asked: `__call__` gives all values at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The values by setting. Raises `SecretFileError`."""
        files = named_files(self._variables, os.environ)
        return {self._variables[name]: read_value(name, file) for name, file in files.items()}
