"""What every number format tells about itself, without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Matrix = tuple[int, int]
"""How a format sees a weight: (output channels, columns)."""


class SchemeError(ValueError):
    """A scheme that cannot be read or is not offered."""


@dataclass(frozen=True)
class Storage:
    """Exact size of one packed tensor, part by part; `added_bits` are what a quantizer stores beside it.

    >>> Storage(value_bits=9, scale_bits=16, zero_point_bits=3).bytes
    5
    """

    value_bits: int
    scale_bits: int
    zero_point_bits: int
    added_bits: int = 0

    @property
    def bits(self) -> int:
        """All stored bits before any rounding to bytes."""
        return sum(self._parts)

    @property
    def bytes(self) -> int:
        """Bytes on disk: all parts are tensors of their own, each in whole bytes."""
        return sum(-(-bits // 8) for bits in self._parts)

    @property
    def _parts(self) -> tuple[int, ...]:
        return self.value_bits, self.scale_bits, self.zero_point_bits, self.added_bits


class Format(Protocol):
    """How one weight matrix is stored."""

    @property
    def family(self) -> str:
        """Key of FORMATS."""

    @property
    def name(self) -> str:
        """Full spelling, every part written out."""

    @property
    def short(self) -> str:
        """Shortest spelling, defaults left out."""

    @property
    def weight_bits(self) -> int:
        """Bits of one stored value, without scales and zero points."""

    def storage(self, matrix: Matrix) -> Storage:
        """Exact size of a packed matrix of (output channels, columns)."""

    def refuses(self, matrix: Matrix) -> str | None:
        """Why this format is not offered for a matrix, or None."""

    def fallback(self, matrix: Matrix) -> str | None:
        """The scheme its runtime stores a refused matrix in, or None where the runtime refuses it too."""


@dataclass(frozen=True)
class Family:
    """One line of FORMATS: a family of formats that share a grammar and a codec.

    `parse` takes the parts of a scheme's spelling and gives the format and the parts it did not use, or
    None where the spelling is another family's. `codec` is the module whose `decode`, `pack` and `unpack`
    handle the family's tensors; beyond integers its `nearest` and `closest` choose scales for the
    quantizers `rtn` and `mse_clip`. It needs torch and is loaded when used. `examples` are what the
    conformance tests check.
    """

    name: str
    grammar: str
    summary: str
    codec: str
    source: str
    parse: Callable[[Sequence[str]], tuple[Format, tuple[str, ...]] | None]
    examples: tuple[Format, ...]
