"""Small floats (FP8, FP4) and NF4 with one scale per tensor, output channel or group of columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from quant.elements import Element, element
from quant.integer import SCALE_BITS, Granularity, ScaleType
from quant.storage import Family, Matrix, SchemeError, Storage


@dataclass(frozen=True)
class Spelling:
    """A name of the grammar with its element type and defaults."""

    name: str
    element: str
    grain: str
    scale_type: ScaleType


SPELLINGS: dict[str, Spelling] = {
    "fp8": Spelling("fp8", "e4m3", "channel", "float32"),
    "fp8-e5m2": Spelling("fp8-e5m2", "e5m2", "channel", "float32"),
    "fp4": Spelling("fp4", "e2m1", "channel", "float16"),
    "nf4": Spelling("nf4", "nf4", "g64", "float32"),
}
"""fp8 scales are max |w| / 448 and would fall below float16's normal numbers; nf4 is as QLoRA stores it,
without its second quantization of the scales."""

GRAMMAR = "(fp8[-e5m2]|fp4|nf4)[-tensor|-channel|-g<size>][-float16|-bfloat16|-float32]"


@dataclass(frozen=True)
class FloatFormat:
    """Values of a small number type times a scale. The last group of each channel is padded.

    >>> parse_float(["fp8"])[0].storage((5, 7)).bytes       # 35 bytes, 5 scales of 32 bits
    55
    >>> parse_float(["nf4"])[0].storage((4, 64)).bits / 256
    4.5
    """

    base: str
    granularity: Granularity = "channel"
    group_size: int | None = None
    scale_type: ScaleType = "float32"

    def __post_init__(self) -> None:
        if self.base not in SPELLINGS:
            raise SchemeError(f"Float must be one of {', '.join(SPELLINGS)}. Got {self.base!r}. Use fp8.")
        if (self.granularity == "group") != (self.group_size is not None):
            raise SchemeError(
                "Group size must be given for groups, and only then."
                f" Got granularity {self.granularity!r} with group size {self.group_size}. Use g128."
            )
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"Group size must be at least 1. Got {self.group_size}. Use g32, g64 or g128.")

    @property
    def family(self) -> str:
        """Key of FORMATS."""
        return "float"

    @property
    def element(self) -> Element:
        """The number type of the values."""
        return element(SPELLINGS[self.base].element)

    @property
    def weight_bits(self) -> int:
        """Bits of one stored value."""
        return self.element.bits

    @property
    def name(self) -> str:
        """Full spelling.

        >>> FloatFormat("fp8").name
        'fp8-channel-float32'
        """
        return f"{self.base}-{self._grain}-{self.scale_type}"

    @property
    def short(self) -> str:
        """Shortest spelling, defaults left out.

        >>> FloatFormat("fp8", "tensor").short
        'fp8-tensor'
        """
        default = SPELLINGS[self.base]
        grain = "" if self._grain == default.grain else f"-{self._grain}"
        scale = "" if self.scale_type == default.scale_type else f"-{self.scale_type}"
        return self.base + grain + scale

    @property
    def _grain(self) -> str:
        return f"g{self.group_size}" if self.granularity == "group" else self.granularity

    def grouped_shape(self, matrix: Matrix) -> tuple[int, int, int]:
        """(output channels, groups per channel, columns per group) after padding."""
        rows, columns = matrix
        size = columns if self.group_size is None else self.group_size
        return (rows, -(-columns // size), size) if columns else (rows, 0, size)

    def scales_shape(self, matrix: Matrix) -> tuple[int, int]:
        """(1, 1) per tensor, else (output channels, groups per channel)."""
        rows, groups, _ = self.grouped_shape(matrix)
        return (1, 1) if self.granularity == "tensor" else (rows, groups)

    def storage(self, matrix: Matrix) -> Storage:
        """Exact size of a packed matrix of (output channels, columns)."""
        rows, groups, size = self.grouped_shape(matrix)
        scale_rows, scale_columns = self.scales_shape(matrix)
        scale_bits = scale_rows * scale_columns * SCALE_BITS[self.scale_type]
        return Storage(rows * groups * size * self.weight_bits, scale_bits, 0)

    def refuses(self, matrix: Matrix) -> str | None:
        """Why this format is not offered for a matrix, or None."""
        rows, columns = matrix
        if rows < 1 or columns < 1:
            return f"the matrix {rows} x {columns} is empty"
        if self.group_size is not None and self.group_size > columns:
            return (
                f"groups of {self.group_size} are longer than the {columns} columns of a channel;"
                " use a smaller group or channel"
            )
        return None

    def fallback(self, matrix: Matrix) -> str | None:
        """None: its runtimes refuse what this format refuses."""
        return None


def parse_float(parts: Sequence[str]) -> tuple[FloatFormat, tuple[str, ...]] | None:
    """Read a format from the parts of a scheme, in any order.

    >>> parse_float(["rtn", "fp8", "e5m2", "tensor"])[0].short
    'fp8-e5m2-tensor'
    """
    names = [part for part in parts if part in SPELLINGS]
    if not names:
        return None
    rest = [part for part in parts if part not in SPELLINGS]
    base = names[0]
    if base == "fp8" and rest.count("e5m2") == 1:
        base = "fp8-e5m2"
        rest.remove("e5m2")
    grains = [part for part in rest if part in ("tensor", "channel") or re.fullmatch(r"g[0-9]{1,9}", part)]
    scales = [part for part in rest if part in SCALE_BITS]
    for slot, found in (("number type", names), ("granularity", grains), ("scale type", scales)):
        if len(found) > 1:
            raise SchemeError(
                f"Scheme must name its {slot} once. Got {found[0]!r} and {found[1]!r}. Drop one of them."
            )
    grain = grains[0] if grains else SPELLINGS[base].grain
    size = int(grain[1:]) if grain[1:].isdigit() else None
    fmt = FloatFormat(
        base=base,
        granularity=cast(Granularity, grain if size is None else "group"),
        group_size=size,
        scale_type=scales[0] if scales else SPELLINGS[base].scale_type,
    )
    return fmt, tuple(part for part in rest if part not in grains and part not in scales)


def _examples() -> tuple[FloatFormat, ...]:
    grains: tuple[tuple[Granularity, int | None], ...] = (
        ("tensor", None),
        ("channel", None),
        ("group", 5),
        ("group", 32),
    )
    return tuple(
        FloatFormat(base, granularity, size, scale_type)
        for base in SPELLINGS
        for granularity, size in grains
        for scale_type in SCALE_BITS
    )


FLOAT = Family(
    name="float",
    grammar=GRAMMAR,
    summary="FP8 (e4m3, e5m2), FP4 (e2m1) and NF4 with one scale per tensor, output channel or group of"
    " columns. Defaults: fp8 channel float32, fp4 channel float16, nf4 g64 float32.",
    codec="quant.codecs.floating",
    source="Micikevicius et al. 2022, arXiv:2209.05433; Dettmers et al. 2023, arXiv:2305.14314",
    parse=parse_float,
    examples=_examples(),
)
