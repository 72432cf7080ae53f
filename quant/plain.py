"""Weights at 16 bits: bfloat16 and IEEE half precision, without scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant.storage import Family, Matrix, SchemeError, Storage

NAMES = ("bf16", "fp16")


@dataclass(frozen=True)
class PlainFormat:
    """A 16-bit float per weight; weights beyond the largest finite value saturate.

    >>> PlainFormat("bf16").storage((5, 7)).bytes
    70
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise SchemeError(f"Plain format must be one of {', '.join(NAMES)}. Got {self.name!r}. Use bf16.")

    @property
    def family(self) -> str:
        """Key of FORMATS."""
        return "plain"

    @property
    def short(self) -> str:
        """Shortest spelling."""
        return self.name

    @property
    def weight_bits(self) -> int:
        """Bits of one stored value."""
        return 16

    def storage(self, matrix: Matrix) -> Storage:
        """Exact size of a packed matrix of (output channels, columns)."""
        return Storage(matrix[0] * matrix[1] * self.weight_bits, 0, 0)

    def refuses(self, matrix: Matrix) -> str | None:
        """Why this format is not offered for a matrix, or None."""
        return None if min(matrix) > 0 else f"the matrix {matrix[0]} x {matrix[1]} is empty"

    def fallback(self, matrix: Matrix) -> str | None:
        """None: every shape is taken."""
        return None


def parse_plain(parts: Sequence[str]) -> tuple[PlainFormat, tuple[str, ...]] | None:
    """Read a format from the parts of a scheme.

    >>> parse_plain(["bf16"])
    (PlainFormat(name='bf16'), ())
    """
    named = [part for part in parts if part in NAMES]
    if not named:
        return None
    if len(named) > 1:
        raise SchemeError(f"Scheme must name its format once. Got {' and '.join(named)}. Drop one of them.")
    return PlainFormat(named[0]), tuple(part for part in parts if part not in NAMES)


PLAIN = Family(
    name="plain",
    grammar="(bf16|fp16)",
    summary="16-bit floats without scales: lossless where the weights have that type already.",
    codec="quant.codecs.plain",
    source="IEEE 754-2019; Kalamkar et al. 2019, arXiv:1905.12322",
    parse=parse_plain,
    examples=tuple(PlainFormat(name) for name in NAMES),
)
