"""Names in a manifest: plain file names, so that no name can leave the folder it is written to."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from service.errors import Unprocessable, json_pointer

LONGEST_NAME = 200
_FORBIDDEN = frozenset('\\/:*?"<>|%')
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))]
)


def check_paths(paths: Sequence[str]) -> None:
    """Raise Unprocessable `invalid-path` for the first name that is not plain or that repeats another but
    for case.
    """
    seen: dict[str, str] = {}
    for position, path in enumerate(paths):
        pointer = json_pointer("files", position, "path")
        check_path(path, pointer)
        folded = path.casefold()
        if folded in seen:
            raise _invalid(path, f"it equals {seen[folded]!r} but for upper and lower case", pointer)
        seen[folded] = path


def check_path(path: str, pointer: str | None = None) -> None:
    """Raise Unprocessable `invalid-path` unless `path` is one plain file name.

    >>> check_path("model-00001-of-00002.safetensors")
    """
    reason = next(_faults(path), None)
    if reason:
        raise _invalid(path, reason, pointer)


def _faults(path: str) -> Iterator[str]:
    if not path:
        yield "it is empty"
    if len(path) > LONGEST_NAME:
        yield f"it has {len(path)} characters, at most {LONGEST_NAME} are allowed"
    if any(unicodedata.category(character)[0] == "C" for character in path):
        yield "it holds a control or invisible formatting character"
    if forbidden := sorted(_FORBIDDEN.intersection(path)):
        yield f"it holds {forbidden[0]!r}"
    if path in {".", ".."} or path != path.strip() or path.endswith("."):
        yield "it is a folder, or begins or ends with a space or ends with a dot"
    if unicodedata.normalize("NFC", path) != path:
        yield "it is not in Unicode normalization form C"
    if path.split(".", 1)[0].casefold() in _DEVICES:
        yield "it is a reserved device name"


def _invalid(path: str, reason: str, pointer: str | None) -> Unprocessable:
    shown = ascii(path if len(path) <= 80 else path[:77] + "...")
    return Unprocessable(
        "invalid-path",
        f"A path must be a plain file name such as 'model.safetensors'. Got {shown}: {reason}. "
        "Send the files of the model folder itself, without folders in their names.",
        pointer=pointer,
    )
