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
from sensitivity.text_rows import iterate_rows

SURPLUS = 8
"""At most so many times the samples that are needed are read, so a huge file costs no more."""

Row = str | list[dict[str, str]]


def tokenized_samples(spec: SessionSpec, task: str, model: nn.Module) -> dict[str, Tensor]:
    """Token tensors: packed to the sequence length for causal_lm, one padded row per text otherwise.

    Raises BadCalibration naming the row.
    """
    if task == "image_classification":
        raise BadCalibration("image_classification must be given tensors. Got text: send a safetensors file.")
    if spec.model.kind != "folder":
        raise BadCalibration("text needs the tokenizer of a model folder. Got a factory: send input_ids.")
    tokenizer = load_tokenizer(Path(spec.model.location))
    length = usable_length(spec.sequence_length, tokenizer, model)
    texts = _texts(iterate_rows(Path(spec.calibration.path), spec.calibration.kind), tokenizer)
    needed = SURPLUS * len(PARTS) * spec.samples
    if task == "causal_lm":
        return {"input_ids": pack(_token_lists(texts, tokenizer), length, needed)}
    return _padded(list(islice(texts, needed)), tokenizer, length)


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


def pack(token_lists: Iterable[list[int]], length: int, most: int) -> Tensor:
    """Whole sequences (n, length) cut from the concatenated lists; a remainder is dropped.

    >>> pack([[1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13]], 2, 9).tolist()
    [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]
    """
    stream: list[int] = []
    for tokens in token_lists:
        stream += tokens
        if len(stream) >= length * most:
            break
    count = min(len(stream) // length, most)
    hint = (
        f"{len(stream)} tokens make {count} sequences of {length}: send more text or shorten the sequences."
    )
    require_enough_samples(count, hint)
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)


def _texts(rows: Iterator[Row], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, whether special tokens are still to be added) of each row."""
    for number, row in enumerate(rows, start=1):
        yield (row, True) if isinstance(row, str) else (_rendered(number, row, tokenizer), False)


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


def _token_lists(texts: Iterable[tuple[str, bool]], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each text, ended by the end-of-text token where the tokenizer has one."""
    end = tokenizer.eos_token_id
    for text, special in texts:
        tokens = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        yield tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _padded(texts: list[tuple[str, bool]], tokenizer: Any, length: int) -> dict[str, Tensor]:
    """One row per text, cut to `length` and padded to the longest; the attention mask hides padding."""
    require_enough_samples(len(texts))
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise BadCalibration("the tokenizer must have a padding token. Got none: send padded input_ids.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [text for text, _ in texts]
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
