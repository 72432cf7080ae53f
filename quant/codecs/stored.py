"""What codecs pass around: coded values, and the bytes they are stored as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.storage import Format, Matrix

F = TypeVar("F", bound=Format)

BLOCK = 1 << 16
"""Weights handled at once: small enough to stay in a core's cache."""


class Grouped(Protocol):
    """A format that cuts rows into groups, the last one of each row padded."""

    def grouped_shape(self, matrix: Matrix) -> tuple[int, int, int]:
        """(output channels, groups per channel, columns per group)."""


@dataclass(frozen=True)
class Coded(Generic[F]):
    """Codes of a matrix, padding included, with their scales.

    `values`: (rows, groups, size). `scales`: what the format keeps beside them, outermost scale last.
    `matrix`: (rows, columns) without padding.
    """

    values: Tensor
    scales: tuple[Tensor, ...]
    fmt: F
    matrix: Matrix


@dataclass(frozen=True)
class Packed(Generic[F]):
    """What is stored: a 1-D uint8 stream of values, and the scales that are tensors of their own."""

    values: Tensor
    scales: tuple[Tensor, ...]
    fmt: F
    matrix: Matrix

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors; equal to `fmt.storage(matrix).bytes`."""
        return self.values.nbytes + sum(scale.nbytes for scale in self.scales)


def grouped(matrix: Tensor, fmt: Grouped) -> Tensor:
    """(rows, columns) -> float32 (rows, groups, size); the last group of each row is padded with zeros."""
    rows, columns = matrix.shape
    shape = fmt.grouped_shape((rows, columns))
    return pad(matrix.float(), (0, shape[1] * shape[2] - columns)).reshape(shape)


def ungrouped(values: Tensor, matrix: Matrix) -> Tensor:
    """(rows, groups, size) -> (rows, columns): the inverse of `grouped`, padding dropped."""
    rows, columns = matrix
    return values.reshape(rows, -1)[:, :columns]


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows that hold about BLOCK weights each.

    >>> [(part.start, part.stop) for part in row_blocks(5, BLOCK // 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def largest(matrix: Tensor, fmt: Grouped) -> Tensor:
    """max |w| of every group, (rows, groups), without a copy of the matrix."""
    rows, columns = matrix.shape
    parts = row_blocks(rows, columns)
    return torch.cat([grouped(matrix[part], fmt).abs().amax(dim=-1) for part in parts])


def own(fmt: Format, family: str, kind: type[F]) -> F:
    """The format as a codec's own. Raises ValueError for another family's."""
    if fmt.family != family:
        raise ValueError(f"Format must be of the {family} family. Got {fmt.name}. Use its own codec.")
    return cast(F, fmt)
