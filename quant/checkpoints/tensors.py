"""Reading stored tensors one at a time, and what quantizing makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quant.checkpoints.source import Source, StoredTensor


def each_stored(source: Source, stored: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Every stored tensor with its values; each file is opened once, one tensor is read at a time."""
    with ExitStack() as stack:
        opened: Path | None = None
        tensors = None
        for item in stored:
            if opened != source.folder / item.file:
                stack.close()
                opened = source.folder / item.file
                tensors = stack.enter_context(safe_open(opened, framework="pt"))
            assert tensors is not None
            yield item, tensors.get_tensor(item.tensor)


def each_joined(
    source: Source, stored: Iterable[StoredTensor]
) -> Iterator[tuple[tuple[StoredTensor, ...], Tensor]]:
    """Every weight that is stored in several tensors: these, and the weight as transformers joins it."""
    parts: dict[str, list[StoredTensor]] = {}
    for item in stored:
        if item.part_of is not None:
            parts.setdefault(item.part_of, []).append(item)
    for parameter, members in parts.items():
        values = {item.tensor: value for item, value in each_stored(source, members)}
        yield tuple(members), source.joined.join(parameter, values)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes in memory order; bfloat16 has no numpy type of its own."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return bytes(flat.numpy().tobytes())
