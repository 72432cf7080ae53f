"""Uniform integer formats of 2 to 8 bits (Jacob et al. 2018, arXiv:1712.05877, section 2.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from quant.storage import Family, Matrix, SchemeError, Storage

ScaleType = Literal["float16", "bfloat16", "float32"]
Granularity = Literal["tensor", "channel", "group"]
SCALE_BITS: dict[ScaleType, int] = {"float16": 16, "bfloat16": 16, "float32": 32}
MIN_BITS, MAX_BITS = 2, 8
GRAMMAR = "w<bits>[-tensor|-channel|-g<size>][-sym|-asym][-float16|-bfloat16|-float32]"


@dataclass(frozen=True)
class IntegerFormat:
    """Integers of `bits` bits with one scale per tensor, output channel or group of columns.

    A weight is scale * value (symmetric) or scale * (value - zero_point). Symmetric values cover
    -2^(bits-1) .. 2^(bits-1)-1; asymmetric values and their zero points cover 0 .. 2^bits-1. Groups run
    along the columns of one output channel; the last group of each channel is padded to full size.

    >>> IntegerFormat(3).storage((5, 7)).bytes          # 35 values of 3 bits, 5 scales of 16 bits
    24
    >>> IntegerFormat(4, symmetric=False, granularity="group", group_size=4).storage((5, 7)).bytes
    45
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    scale_type: ScaleType = "float16"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(
                f"Weight bits must be {MIN_BITS} to {MAX_BITS}. Got {self.bits}. Use w2, w3, ... or w8."
            )
        if self.granularity not in get_args(Granularity):
            raise SchemeError(
                f"Granularity must be tensor, channel or group. Got {self.granularity!r}. Use channel."
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise SchemeError(
                "Group size must be given for groups, and only then."
                f" Got granularity {self.granularity!r} with group size {self.group_size}. Use g128."
            )
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"Group size must be at least 1. Got {self.group_size}. Use g32, g64 or g128.")
        if self.scale_type not in SCALE_BITS:
            raise SchemeError(
                f"Scale type must be one of {', '.join(SCALE_BITS)}. Got {self.scale_type!r}. Use float16."
            )

    @property
    def family(self) -> str:
        """Key of FORMATS."""
        return "integer"

    @property
    def weight_bits(self) -> int:
        """Bits of one stored value."""
        return self.bits

    @property
    def lowest(self) -> int:
        """Smallest stored integer."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """Largest stored integer."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def name(self) -> str:
        """Full spelling.

        >>> IntegerFormat(4).name
        'w4-channel-sym-float16'
        """
        return "-".join((f"w{self.bits}", self._grain, "sym" if self.symmetric else "asym", self.scale_type))

    @property
    def short(self) -> str:
        """Shortest spelling, defaults left out.

        >>> IntegerFormat(4, symmetric=False, granularity="group", group_size=32).short
        'w4-g32-asym'
        """
        parts = (
            (f"w{self.bits}", True),
            (self._grain, self.granularity != "channel"),
            ("asym", not self.symmetric),
            (self.scale_type, self.scale_type != "float16"),
        )
        return "-".join(text for text, shown in parts if shown)

    @property
    def _grain(self) -> str:
        return f"g{self.group_size}" if self.granularity == "group" else self.granularity

    def grouped_shape(self, matrix: Matrix) -> tuple[int, int, int]:
        """(output channels, groups per channel, columns per group) after padding.

        >>> IntegerFormat(4, granularity="group", group_size=4).grouped_shape((5, 7))
        (5, 2, 4)
        """
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
        scales = scale_rows * scale_columns
        return Storage(
            value_bits=rows * groups * size * self.bits,
            scale_bits=scales * SCALE_BITS[self.scale_type],
            zero_point_bits=0 if self.symmetric else scales * self.bits,
        )

    def refuses(self, matrix: Matrix) -> str | None:
        """Why this format is not offered for a matrix, or None.

        A group longer than a channel would store padding only: per channel costs less and says the same.

        >>> IntegerFormat(4, granularity="group", group_size=128).refuses((8, 27))
        'groups of 128 are longer than the 27 columns of a channel; use a smaller group or channel'
        """
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
        """None: runtimes refuse groups longer than a channel."""
        return None


def parse_integer(parts: Sequence[str]) -> tuple[IntegerFormat, tuple[str, ...]] | None:
    """Read an integer format from the parts of a scheme, in any order.

    >>> parse_integer(["asym", "w4", "g32", "rtn"])[1]
    ('rtn',)
    """
    if not any(re.fullmatch(r"w[0-9]+(a[0-9]+)?", part) for part in parts):
        return None
    found: dict[str, str] = {}
    rest: list[str] = []
    for part in parts:
        slot = _slot(part)
        if slot is None:
            rest.append(part)
        elif slot in found:
            raise SchemeError(
                f"Scheme must name its {slot} once. Got {found[slot]!r} and {part!r}. Drop one of them."
            )
        else:
            found[slot] = part
    return _build(found), tuple(rest)


def _slot(part: str) -> str | None:
    """Which part of the grammar a word fills, or None for a word that is not ours."""
    if re.fullmatch(r"w[0-9]+a[0-9]+", part):
        raise SchemeError(
            f"Scheme must spell activations as a part of their own. Got {part!r}."
            f" Use {part.replace('a', '-aint')!r}."
        )
    if re.fullmatch(r"w[0-9]{1,9}", part):
        return "bits"
    if part in ("tensor", "channel") or re.fullmatch(r"g[0-9]{1,9}", part):
        return "granularity"
    if part in ("sym", "asym"):
        return "symmetry"
    return "scale type" if part in SCALE_BITS else None


def _build(found: dict[str, str]) -> IntegerFormat:
    if "bits" not in found:
        raise SchemeError(f"Weight bits must be {MIN_BITS} to {MAX_BITS}. Got too many digits. Use w4.")
    grain = found.get("granularity", "channel")
    size = int(grain[1:]) if grain[1:].isdigit() else None
    return IntegerFormat(
        bits=int(found["bits"][1:]),
        symmetric=found.get("symmetry", "sym") == "sym",
        granularity=cast(Granularity, grain if size is None else "group"),
        group_size=size,
        scale_type=cast(ScaleType, found.get("scale type", "float16")),
    )


def _examples() -> tuple[IntegerFormat, ...]:
    """Every width, symmetry, granularity and scale type, odd group sizes included."""
    grains: tuple[tuple[Granularity, int | None], ...] = (
        ("tensor", None),
        ("channel", None),
        ("group", 1),
        ("group", 5),
        ("group", 32),
    )
    return tuple(
        IntegerFormat(bits, symmetric, granularity, size, scale_type)
        for bits in range(MIN_BITS, MAX_BITS + 1)
        for symmetric in (True, False)
        for granularity, size in grains
        for scale_type in SCALE_BITS
    )


INTEGER = Family(
    name="integer",
    grammar=GRAMMAR,
    summary="Uniform integers of 2 to 8 bits, packed without gaps, with one scale (and zero point) per"
    " tensor, output channel or group of columns.",
    codec="quant.packing",
    source="Jacob et al. 2018, arXiv:1712.05877",
    parse=parse_integer,
    examples=_examples(),
)
