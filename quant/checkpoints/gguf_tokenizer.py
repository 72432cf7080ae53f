"""A `tokenizer.json` as the vocabulary of a GGUF file, where llama.cpp can tokenize as it does. No torch.

Three kinds can be said: byte-level BPE ("gpt2" there), told apart by how text is split before merging; BPE
over characters with bytes as a last resort ("llama" there, SentencePiece's); BERT's WordPiece ("bert").
Whatever else a tokenizer does is refused, because llama.cpp would make other tokens of the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoints.protocol import CheckpointError

FILE = "tokenizer.json"
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PIECES = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    (CONTRACTIONS + PIECES % r"\p{N}{1,3}", True): "llama-bpe",
    (CONTRACTIONS + PIECES % r"\p{N}", False): "qwen2",
    (CASED, True): "tekken",
}
"""(expression of the pre-tokenizer, whether whole words skip merging) -> llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's part of a GGUF header.

    `scores` and `space_prefix` are SentencePiece's, `lowercase`, `strip_accents` and `unknown` (a token)
    WordPiece's; None for the other kinds. `first` and `last` stand before and after a text.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    space_prefix: bool | None
    first: int | None
    last: int | None
    lowercase: bool | None = None
    strip_accents: bool | None = None
    unknown: int | None = None


def read_vocabulary(folder: Path, size: int) -> Vocabulary | None:
    """The vocabulary of a model folder, padded to `size` tokens; None for a folder without a tokenizer.

    Raises CheckpointError that says what llama.cpp cannot do.
    """
    place = folder / FILE
    if not place.is_file():
        others = sorted(file.name for file in folder.glob("*token*"))
        if others:
            raise _refusal("be stored as tokenizer.json", f"only {', '.join(others)}")
        return None
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        return _read(content, place, size)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _refusal("be a tokenizer.json of the tokenizers library", repr(error)) from error


def _refusal(must: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"Tokenizer must {must} to be written for llama.cpp. Got {got:.200}."
        " Use a tokenizer like Llama's, Qwen's or BERT's, or write the checkpoint without tokenizer files."
    )


def _read(content: Mapping[str, Any], place: Path, size: int) -> Vocabulary:
    model = content["model"]
    if model["type"] not in ("BPE", "WordPiece"):
        raise _refusal("be BPE or WordPiece", str(model["type"]))
    pieces = model["type"] == "WordPiece"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key) and not pieces:
            raise _refusal(f"have no {key}", str(model[key]))
    added = content.get("added_tokens") or []
    ids: dict[str, int] = {**model["vocab"], **{item["content"]: item["id"] for item in added}}
    outside = [number for number in ids.values() if not 0 <= number < size]
    if outside or len(set(ids.values())) < len(ids):
        raise _refusal(f"have ids of one token each below {size}", str(outside[:1] or "an id twice"))
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for token, number in ids.items():
        tokens[number], types[number] = token, NORMAL
    for item in added:
        types[item["id"]] = CONTROL if item["special"] else USER_DEFINED
    first, last = _ends(place)
    if pieces:
        return _word_pieces(content, tokens, types, first, last)
    if not model.get("byte_fallback"):
        told = ("gpt2", _split_name(content), tuple(tokens), tuple(types), None, None)
        return Vocabulary(*told, first, last)
    scores = _scores(model, size)
    for token, number in model["vocab"].items():
        if types[number] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = BYTE
    if model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = UNKNOWN
    prefix = _space_prefix(content)
    return Vocabulary("llama", "default", tuple(tokens), tuple(types), scores, prefix, first, last)


def _ends(place: Path) -> tuple[int | None, int | None]:
    """The tokens that the tokenizer puts before and after a text."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(place))
    except Exception as error:
        raise _refusal("be a tokenizer.json of the tokenizers library", str(error)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    for first in (0, 1):
        for last in (0, 1):
            if full[first : len(full) - last] == bare:
                return full[0] if first else None, full[-1] if last else None
    raise _refusal("add at most one token before and one after a text", str(full))


def _word_pieces(
    content: Mapping[str, Any], tokens: list[str], types: list[int], first: int | None, last: int | None
) -> Vocabulary:
    """llama.cpp spells a token that begins a word with `▁`, and one that goes on without BERT's `##`."""
    model, normalizer = content["model"], content.get("normalizer") or {}
    kinds = (normalizer.get("type"), (content.get("pre_tokenizer") or {}).get("type"))
    if kinds != ("BertNormalizer", "BertPreTokenizer"):
        raise _refusal("have a BertNormalizer and a BertPreTokenizer", str(kinds))
    for key in ("clean_text", "handle_chinese_chars"):
        if not normalizer.get(key):
            raise _refusal(f"have {key}", json.dumps(normalizer))
    if model.get("continuing_subword_prefix") != "##" or model["unk_token"] not in model["vocab"]:
        raise _refusal(
            "mark tokens that go on with ## and know its unk_token", json.dumps(model["unk_token"])
        )
    if first is None or last is None:
        raise _refusal("put one token before and one after a text", str((first, last)))
    if USER_DEFINED in types:
        raise _refusal("have no added tokens but special ones", tokens[types.index(USER_DEFINED)])
    unknown = model["vocab"][model["unk_token"]]
    types[unknown] = CONTROL
    spelled = tuple(
        token.removeprefix("##") if token.startswith("##") else SPACE + token if kind == NORMAL else token
        for token, kind in zip(tokens, types, strict=True)
    )
    if len(set(spelled)) < len(spelled):
        raise _refusal("have tokens that differ without ##", "two alike")
    lowercase, accents = bool(normalizer.get("lowercase")), normalizer.get("strip_accents")
    strips = lowercase if accents is None else bool(accents)
    ends = (first, last, lowercase, strips, unknown)
    return Vocabulary("bert", "default", spelled, tuple(types), None, None, *ends)


def _split_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way that text is split for byte-level BPE."""
    normalizer, pre = content.get("normalizer"), content.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    merged = bool(content["model"].get("ignore_merges"))
    name = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not merged:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and not merged:
        name = "smollm" if steps[1].get("use_regex", True) else None
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        name = SPLITS.get((steps[0]["pattern"].get("Regex"), merged)) if isolated else None
    if name is None or steps[-1].get("add_prefix_space"):
        known = ", ".join(("gpt-2", "smollm", *SPLITS.values()))
        raise _refusal(f"split text as one of {known}", json.dumps(pre))
    if normalizer is not None and not (name == "qwen2" and normalizer == {"type": "NFC"}):
        raise _refusal("leave text as it is before splitting", json.dumps(normalizer))
    return name


def _space_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text whose spaces become `▁`."""
    normalizer, pre = content.get("normalizer"), content.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if pre is None and normalizer in (replace, {"type": "Sequence", "normalizers": [replace]}):
        return False
    if pre is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return True
    if normalizer is None and pre and pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE:
        scheme = pre.get("prepend_scheme", "always")
        if not pre.get("split", True):
            return bool(scheme != "never")
    raise _refusal(
        "only turn spaces into ▁, with or without one before the text, and split nowhere",
        json.dumps({"normalizer": normalizer, "pre_tokenizer": pre}, ensure_ascii=False),
    )


def _scores(model: Mapping[str, Any], size: int) -> tuple[float, ...]:
    """SentencePiece's scores: the sooner a token is merged, the higher.

    SentencePiece merges any two neighbors that make a token, so the merges must be all of them, token by
    token.
    """
    merges = [tuple(item.split(" ")) if isinstance(item, str) else tuple(item) for item in model["merges"]]
    vocabulary, known = model["vocab"], set(merges)
    order = list(dict.fromkeys(left + right for left, right in merges))
    rank = {token: number for number, token in enumerate(order)}
    ranks = [rank[left + right] for left, right in merges]
    for token in vocabulary:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                raise _refusal("list every pair that makes a token, as SentencePiece merges", f"no {pair}")
    if ranks != sorted(ranks):
        raise _refusal("merge token by token, as SentencePiece does", "merges in another order")
    scores = [0.0] * size
    for token, number in vocabulary.items():
        scores[number] = -float(rank[token]) if token in rank else 0.0
    return tuple(scores)
