"""Reading stored tensors one at a time, and what quantizing makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant.checkpoints.source import Source, StoredTensor


def each_stored(source: Source, stored: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Every stored tensor with its values; each file is opened once, one tensor is read at a time."""
    with reading(source) as read:
        for item in stored:
            yield item, read(item.tensor)


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


@contextmanager
def reading(source: Source) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads a tensor by its name. Each file is opened when first needed, and stays open."""
    with ExitStack() as stack:

        @cache
        def opened(file: str) -> Any:
            return stack.enter_context(safe_open(source.folder / file, framework="pt"))

        def read(name: str) -> Tensor:
            found: Tensor = opened(source.entries[name][0]).get_tensor(name)
            return found

        yield read


def planned_weights(
    unpacked: Iterable[tuple[str, str | None, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """(layer, weight) of the (name, planned layer or None, values) of a whole folder."""
    return ((layer, weight) for _, layer, weight in unpacked if layer is not None)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes in memory order; bfloat16 has no numpy type of its own."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return bytes(flat.numpy().tobytes())
