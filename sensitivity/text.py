"""Rows of text as token tensors, with the model folder's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.calibration_check import require_enough_samples
from sensitivity.errors import BadCalibration
from sensitivity.spec import PARTS, SessionSpec
from sensitivity.text_rows import Row, iterate_contexts

SURPLUS = 8
"""At most so many times the samples that are needed are read, so a huge file costs no more."""

Classes = tuple[str, ...] | None
"""The context of each sample, where rows name one."""


def tokenized_samples(spec: SessionSpec, task: str, model: nn.Module) -> tuple[dict[str, Tensor], Classes]:
    """Token tensors: packed to the sequence length for causal_lm, one padded row per text otherwise. Rows of
    different contexts never share a sequence.

    Raises BadCalibration naming the row.
    """
    if task in ("image_classification", "diffusion"):
        raise BadCalibration(f"{task} must be given tensors. Got text: send a safetensors file.")
    if spec.model.kind != "folder":
        raise BadCalibration("text needs the tokenizer of a model folder. Got a factory: send input_ids.")
    tokenizer = load_tokenizer(Path(spec.model.location))
    length = usable_length(spec.sequence_length, tokenizer, model)
    texts = _texts(iterate_contexts(Path(spec.calibration.path), spec.calibration.kind), tokenizer)
    needed = SURPLUS * len(PARTS) * spec.samples
    if task == "causal_lm":
        sequences, contexts = pack(_token_lists(texts, tokenizer), length, needed)
        return {"input_ids": sequences}, contexts
    found = list(islice(texts, needed))
    return _padded(found, tokenizer, length), _all_named([context for _, _, context in found])


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, from local files only. Raises BadCalibration when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise BadCalibration(
            f"text needs a tokenizer in the model folder. Got {type(error).__name__}: {error!s:.200}. "
            "Save the tokenizer beside the model, or send input_ids as safetensors."
        ) from error


def usable_length(wanted: int, tokenizer: Any, model: nn.Module) -> int:
    """The sequence length, cut to what tokenizer and position embeddings allow."""
    limits = [wanted, int(min(tokenizer.model_max_length, 2**31))]
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    return min(limits)


def pack(
    token_lists: Iterable[tuple[list[int], str | None]], length: int, most: int
) -> tuple[Tensor, Classes]:
    """Whole sequences (n, length) cut from the concatenated lists of each context, and the context of each
    sequence; remainders are dropped.

    >>> rows = [([1, 2, 3, 4], None), ([5, 6, 7, 8, 9], None), ([10, 11, 12, 13], None)]
    >>> pack(rows, 2, 9)[0].tolist()
    [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]
    """
    streams: dict[str | None, list[int]] = {}
    read = 0
    for tokens, context in token_lists:
        streams.setdefault(context, []).extend(tokens)
        read += len(tokens)
        if read >= length * most:
            break
    cut = [
        (stream[start : start + length], context)
        for context, stream in streams.items()
        for start in range(0, len(stream) // length * length, length)
    ][:most]
    hint = f"{read} tokens make {len(cut)} sequences of {length}: send more text or shorten the sequences."
    require_enough_samples(len(cut), hint)
    sequences = torch.tensor([sequence for sequence, _ in cut], dtype=torch.int64)
    return sequences, _all_named([context for _, context in cut])


def _all_named(contexts: list[str | None]) -> Classes:
    named = tuple(context for context in contexts if context is not None)
    return named or None


def _texts(rows: Iterator[tuple[Row, str | None]], tokenizer: Any) -> Iterator[tuple[str, bool, str | None]]:
    """(text, whether special tokens are still to be added, context) of each row."""
    for number, (row, context) in enumerate(rows, start=1):
        if isinstance(row, str):
            yield row, True, context
        else:
            yield _rendered(number, row, tokenizer), False, context


def _rendered(number: int, messages: list[dict[str, str]], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise BadCalibration(
            f'row {number} holds "messages", but the tokenizer must have a chat template for them. '
            'Got none: send rows with "text".'
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        raise BadCalibration(f"row {number} must fit the chat template. Got {error!s:.200}.") from error


def _token_lists(
    texts: Iterable[tuple[str, bool, str | None]], tokenizer: Any
) -> Iterator[tuple[list[int], str | None]]:
    """Token ids and context of each text, ended by the end-of-text token where the tokenizer has one."""
    end = tokenizer.eos_token_id
    for text, special, context in texts:
        tokens = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        yield tokens if end is None or tokens[-1:] == [end] else [*tokens, end], context


def _padded(texts: list[tuple[str, bool, str | None]], tokenizer: Any, length: int) -> dict[str, Tensor]:
    """One row per text, cut to `length` and padded to the longest; the attention mask hides padding."""
    require_enough_samples(len(texts))
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise BadCalibration("the tokenizer must have a padding token. Got none: send padded input_ids.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [text for text, _, _ in texts]
    encoded = tokenizer(
        rows,
        add_special_tokens=texts[0][1],
        truncation=True,
        max_length=length,
        padding=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return {name: tensor for name, tensor in encoded.items() if isinstance(tensor, torch.Tensor)}
