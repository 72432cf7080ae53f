"""The tensors of GPTQ checkpoints, which several consumers store."""

from __future__ import annotations

from collections.abc import Iterator

from quant.export.protocol import Deployment, Violation, WeightFacts
from quant.storage import Matrix

WORD = 32
"""Bits of a packed word; words run along the columns, and for zero points along the output channels."""


def whole_words(deployment: Deployment) -> Iterator[Violation]:
    """Columns and output channels must fill whole words at every width."""
    for name in deployment.quantized:
        rows, columns = deployment.layers[name].matrix
        if rows % WORD or columns % WORD:
            rule = f"output channels and columns must be multiples of {WORD}"
            yield Violation(name, rule, f"{rows} x {columns}")


def layout_bytes(facts: WeightFacts, matrix: Matrix) -> int:
    """Packed values, packed zero points (for symmetric weights too) and float16 scales.

    >>> layout_bytes(WeightFacts("int", 4, True, "group", 32), (64, 128))
    4736
    """
    rows, columns = matrix
    groups = columns // (facts.group_size or columns)
    return columns * rows * facts.bits // 8 + groups * rows * facts.bits // 8 + groups * rows * 2


def group_size(facts: WeightFacts) -> int:
    """The size as these consumers write it: -1 for one group per output channel."""
    return -1 if facts.group_size is None else facts.group_size


def grain(size: int) -> tuple[str, int | None]:
    """Granularity and group size of what they write."""
    return ("channel", None) if size == -1 else ("group", size)
