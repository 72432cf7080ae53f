"""Files beside config.json and the weights (tokenizer, processor, generation), before a library reads any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.errors import Unprocessable, json_pointer
from service.ingest.model_config import refuse_code
from service.ingest.strict_json import parse_object

LARGEST_CONFIGURATION = 10_000_000
"""Bytes of a configuration of tokenizer or processor; those with many added tokens have a few million."""
LARGEST_VOCABULARY = 100_000_000
LARGEST_TOKEN = 2**31 - 1
_CONFIGURATIONS = frozenset(
    {
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.json",
    }
)
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})
_BINARY = (".model", ".spm")
_TEXTS = (".txt", ".jinja")
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


def check_companion(name: str, path: Path) -> None:
    """Raise Unprocessable for a file that is too large, is not what its name says, asks for code of its own,
    or numbers a token beyond 2^31 - 1; files of other names pass.

    >>> check_companion("README.md", Path("anywhere"))
    """
    if name in _CONFIGURATIONS:
        refuse_code(_object(name, path, LARGEST_CONFIGURATION), name)
    elif name in _VOCABULARIES:
        _check_tokens(name, _object(name, path, LARGEST_VOCABULARY))
    elif name.endswith(_TEXTS):
        _check_text(name, _read(name, path, LARGEST_VOCABULARY))
    elif name.endswith(_BINARY) and _read(name, path, LARGEST_VOCABULARY).startswith(_PICKLES):
        raise _invalid(name, "a SentencePiece model", "a pickle")


def _object(name: str, path: Path, largest: int) -> dict[str, Any]:
    return parse_object(_read(name, path, largest), what=name, slug="invalid-tokenizer", largest=largest)


def _read(name: str, path: Path, largest: int) -> bytes:
    if (size := path.stat().st_size) > largest:
        raise _invalid(name, f"at most {largest} bytes long", f"{size}")
    return path.read_bytes()


def _check_text(name: str, data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(name, "UTF-8 text", f"an invalid byte at {error.start}") from None


def _check_tokens(name: str, content: Mapping[str, Any]) -> None:
    if name != "tokenizer.json":
        _check_numbers(name, (), content)
        return
    model, added = content.get("model"), content.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise _invalid(name, "an object with a model and a list of added_tokens", "none")
    if isinstance(model.get("vocab"), dict):
        _check_numbers(name, ("model", "vocab"), model["vocab"])
    for position, token in enumerate(added):
        if not isinstance(token, dict) or not _is_token(token.get("id")):
            raise _no_token(name, ("added_tokens", position), token)


def _check_numbers(name: str, place: tuple[str, ...], vocabulary: Mapping[str, Any]) -> None:
    for token, number in vocabulary.items():
        if not _is_token(number):
            raise _no_token(name, (*place, token), number)


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_TOKEN


def _no_token(name: str, place: tuple[str | int, ...], found: Any) -> Unprocessable:
    got = f"{str(found)[:80]} at {json_pointer(*place)[:200]}"
    return _invalid(name, f"a vocabulary of tokens numbered from 0 to {LARGEST_TOKEN}", got)


def _invalid(name: str, must: str, got: str) -> Unprocessable:
    return Unprocessable(
        "invalid-tokenizer",
        f"{name} must be {must}. Got {got}. Send the file that tokenizer.save_pretrained(folder) writes.",
    )
