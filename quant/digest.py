"""Digests of what a result was made from: plain lowercase hexadecimal SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

CHUNK = 1 << 20
CONFIG = "config.json"
DIFFUSERS_CLASS = "_class_name"
"""The member of config.json that names a class of diffusers; transformers' configurations have none."""
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""Names of a single weight file: those of transformers and of diffusers."""
INDEXES = tuple(f"{name}.index.json" for name in WEIGHTS)
COMPANIONS = (
    CONFIG,
    *INDEXES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
    "*.model",
    "*.spm",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


class FolderError(ValueError):
    """The folder is not a Hugging Face folder with safetensors weights."""


class ManifestEntry(TypedDict):
    """One file of a model folder: plain name, size in bytes, SHA-256 of its content."""

    path: str
    size: int
    sha256: str


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, no NaN, UTF-8.

    >>> canonical_json({"b": 1.5, "a": [1, None]})
    '{"a":[1,null],"b":1.5}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`.

    >>> digest({"a": 1})[:16]
    '015abd7f5cc57a2d'
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces of 1 MiB."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            state.update(piece)
    return state.hexdigest()


def folder_digest(path: Path | str) -> tuple[str, tuple[ManifestEntry, ...]]:
    """Digest of a model folder and the manifest it was computed from.

    The manifest holds, sorted by name, every file that can change a number: the weights that the
    folder's index names (or model.safetensors, or every *.safetensors), config.json, and the files of
    tokenizer and processor. Anything else in the folder (a README, a plan, calibration data beside
    model.safetensors) changes nothing.

    Raises FolderError when config.json or safetensors weights are missing.
    """
    folder = Path(path)
    manifest = tuple(_entry(folder, name) for name in model_files(folder))
    return manifest_digest(manifest), manifest


def model_files(folder: Path) -> tuple[str, ...]:
    """Names of the files that `folder_digest` is about, sorted. Raises FolderError as it does."""
    return tuple(sorted({*weight_files(folder), *_companions(folder)}))


def manifest_digest(manifest: Iterable[Mapping[str, Any]]) -> str:
    """Digest of a model from the path, size and sha256 of each of its files, in any order.

    >>> one, two = ({"path": name, "size": 1, "sha256": "ab"} for name in ("a.json", "b.safetensors"))
    >>> manifest_digest([one, two]) == manifest_digest([two, one])
    True
    """
    entries = [{key: entry[key] for key in ("path", "size", "sha256")} for entry in manifest]
    return digest(sorted(entries, key=lambda entry: str(entry["path"])))


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files that hold the folder's weights, sorted.

    Raises FolderError when the folder, its config.json, or a weight file is missing.
    """
    if not folder.is_dir():
        raise FolderError(f"Model must be a folder. Got {str(folder)!r}. Pass a Hugging Face folder.")
    if not (folder / CONFIG).is_file():
        raise FolderError(
            f"Model folder must hold {CONFIG}. Got {str(folder)!r} without it. Save with save_pretrained()."
        )
    names = _indexed(folder) or _unindexed(folder)
    for name in names:
        if not (folder / name).is_file():
            raise FolderError(
                f"Model folder must hold every weight file that its index names. Got no {name!r} in"
                f" {str(folder)!r}. Download the missing shard again."
            )
    return names


def _indexed(folder: Path) -> tuple[str, ...]:
    """Shards named by the index; () where there is no index, or a single file wins over it."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if _single(folder) or index is None:
        return ()
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FolderError(
            f"{index.name} must be JSON with a weight_map. Got {error!r}. Save it again."
        ) from error
    for name in names:
        if not isinstance(name, str) or not _is_plain(name) or not name.endswith(".safetensors"):
            raise FolderError(
                f"{index.name} must name plain *.safetensors files of its own folder. Got {name!r}. Save it"
                " again."
            )
    if not names:
        raise FolderError(f"{index.name} must name at least one weight file. Got none. Save it again.")
    return tuple(names)


def _is_plain(name: str) -> bool:
    return PurePosixPath(name).name == name and "\\" not in name and name not in ("", ".", "..")


def _single(folder: Path) -> tuple[str, ...]:
    """The one weight file that wins over all others; () where there is none."""
    return tuple(name for name in WEIGHTS if (folder / name).is_file())[:1]


def _unindexed(folder: Path) -> tuple[str, ...]:
    if single := _single(folder):
        return single
    names = tuple(sorted(file.name for file in folder.glob("*.safetensors")))
    if names:
        return names
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    got = f"only {', '.join(pickles)}" if pickles else "no weights"
    raise FolderError(
        f"Model folder must hold safetensors weights. Got {got} in {str(folder)!r}."
        " Save with save_pretrained(), which writes safetensors; pickles are never read, but"
        " bitplan convert turns them into safetensors."
    )


def _companions(folder: Path) -> list[str]:
    files = (file.name for file in folder.iterdir() if file.is_file())
    return [name for name in files if any(fnmatchcase(name, pattern) for pattern in COMPANIONS)]


def _entry(folder: Path, name: str) -> ManifestEntry:
    file = folder / name
    return {"path": name, "size": file.stat().st_size, "sha256": file_digest(file)}
