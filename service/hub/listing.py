"""What a hub says of a commit: its files with sizes and digests, none of it believed unchecked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from service.errors import Conflict, NotFound, ServiceError, TooLarge, Unprocessable
from service.hub.reference import HubReference
from service.ingest.kinds import INSTEAD, MODEL_FILES, check_model_files, is_model_file, refusal
from service.ingest.paths import check_path
from service.ingest.strict_json import parse_object

LARGEST_LISTING = 32 * 2**20
MOST_FILES = 50_000
LARGEST_SMALL_FILE = 100_000_000
"""Bytes of a file that is no weights, and of any that the hub keeps in git itself."""
LONGEST_PATH = 1000
BLOB = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")
PIPELINE = "model_index.json"


@dataclass(frozen=True)
class HubFile:
    """One file of the folder: `sha256` of what is in large file storage, else the id of its `blob` in git."""

    name: str
    size: int
    blob: str
    sha256: str | None

    @property
    def is_plain(self) -> bool:
        """Whether it is in git itself."""
        return self.sha256 is None


def read_listing(data: bytes, wanted: HubReference, most_bytes: int) -> tuple[HubFile, ...]:
    """The files of the wanted folder that may make a model, by name.

    Raises Conflict `hub-mismatch` for what the hub must not say, NotFound for a folder without files,
    UnsupportedFile or Unprocessable for files that are no model, TooLarge beyond `most_bytes`.
    """
    answer = parse_object(data, what="The hub's list of files", slug="hub-mismatch", largest=LARGEST_LISTING)
    _check_identity(answer, wanted)
    entries = dict(_entries(answer))
    inside = [name for name in entries if name.startswith(wanted.prefix)]
    names = sorted(name.removeprefix(wanted.prefix) for name in inside)
    names = [name for name in names if "/" not in name]
    if not names:
        raise NotFound(
            "hub-folder-not-found",
            f"A folder of the repository must have files. Got {wanted.folder!r}, which has none. Look at its "
            "files on the hub.",
            pointer="/hub/folder",
        )
    taken = [name for name in names if is_model_file(name)]
    _check_kinds(taken, names, entries, wanted)
    files = tuple(_file(name, entries[wanted.prefix + name]) for name in taken)
    total = sum(file.size for file in files if not file.name.endswith(".safetensors"))
    if total > most_bytes:
        raise too_large(total, most_bytes)
    return files


def too_large(total: int, most: int) -> TooLarge:
    """More bytes than uploads may have."""
    return TooLarge(
        "too-large", f"A model must have at most {most} bytes in all. Got {total}. Take a smaller model."
    )


def mismatch(reason: str) -> Conflict:
    """The hub said or sent something else than it must."""
    return Conflict(
        "hub-mismatch",
        f"The hub must give the files of exactly this commit, as it lists them. Got {reason}. Try again; if "
        "it stays so, upload the files.",
    )


def _check_identity(answer: Mapping[str, Any], wanted: HubReference) -> None:
    commit, name = answer.get("sha"), answer.get("id", wanted.repository)
    if commit != wanted.commit:
        raise mismatch(f"commit {str(commit)[:80]!r} instead of {wanted.commit}")
    if name != wanted.repository:
        raise mismatch(f"repository {str(name)[:120]!r}, its present name, instead of {wanted.repository}")


def _entries(answer: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    siblings = answer.get("siblings")
    if not isinstance(siblings, list) or len(siblings) > MOST_FILES:
        raise mismatch(f"no list of at most {MOST_FILES} files")
    seen = set()
    for entry in siblings:
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _is_inside(name):
            raise mismatch(f"a file named {str(name)[:120]!r}, which leads out of the repository")
        if name in seen:
            raise mismatch(f"the file {name[:120]!r} twice")
        seen.add(name)
        yield name, entry


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return (
        len(name) <= LONGEST_PATH
        and not any(part in ("", ".", "..") for part in parts)
        and not any(character in "\\\0" or ord(character) < 32 for character in name)
    )


def _check_kinds(
    taken: list[str], names: list[str], entries: Mapping[str, Mapping[str, Any]], wanted: HubReference
) -> None:
    """Raise what to do about files that are no model: the folder of a pipeline, safetensors for pickles."""
    for name in taken:
        check_path(name)
    if "config.json" not in taken and PIPELINE in names:
        raise _pipeline(entries, wanted)
    if not any(name.endswith(".safetensors") for name in taken):
        instead = [name for name in names if any(_is_known(name, patterns) for patterns, *_ in INSTEAD)]
        if instead:
            raise refusal(instead[0], "/hub", ", ".join(MODEL_FILES))
    check_model_files(taken)


def _is_known(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _pipeline(entries: Mapping[str, Any], wanted: HubReference) -> ServiceError:
    start = wanted.prefix
    folders = sorted(
        name.removeprefix(start).removesuffix("/config.json")
        for name in entries
        if name.startswith(start) and name.endswith("/config.json")
    )
    return Unprocessable(
        "missing-file",
        f"A model must have config.json. Got a pipeline of several models. Name the folder of one, its unet "
        f"or transformer: {', '.join(folders[:20]) or 'there is none'}.",
        pointer="/hub/folder",
        extra={"folders": folders[:20]},
    )


def _file(name: str, entry: Mapping[str, Any]) -> HubFile:
    size, blob, large = entry.get("size"), entry.get("blobId"), entry.get("lfs")
    if type(size) is not int or not 0 <= size < 2**53:
        raise mismatch(f"{name} of size {str(size)[:40]!r}")
    if size > LARGEST_SMALL_FILE and (large is None or not name.endswith(".safetensors")):
        raise TooLarge(
            "too-large",
            f"A file beside the weights must have at most {LARGEST_SMALL_FILE} bytes. Got {size} for {name}. "
            "Take another model.",
            pointer="/hub",
        )
    if large is None:
        if not isinstance(blob, str) or not BLOB.fullmatch(blob):
            raise mismatch(f"{name} with the git id {str(blob)[:80]!r}")
        return HubFile(name, size, blob, None)
    sha256 = large.get("sha256") if isinstance(large, dict) else None
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256) or large.get("size", size) != size:
        raise mismatch(f"{name} with the large file {str(large)[:120]!r}, of {size} bytes")
    return HubFile(name, size, "", sha256)
