"""Block floats: MXFP4 and MXFP8 (Rouhani et al. 2023, arXiv:2310.10537) and NVFP4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant.elements import Element, element
from quant.storage import Family, Matrix, SchemeError, Storage


@dataclass(frozen=True)
class BlockFormat:
    """Values of a small float in blocks of columns, each with an 8-bit scale.

    `scale` is "e8m0" (a power of two) or "e4m3"; e4m3 scales are multiplied by one float32 scale of the
    whole tensor.

    >>> BLOCKS["mxfp4"].storage((4, 64)).bits / 256, BLOCKS["nvfp4"].storage((4, 64)).bits
    (4.25, 1184)
    """

    name: str
    base: str
    size: int
    scale: str

    @property
    def family(self) -> str:
        """Key of FORMATS."""
        return "microscaling"

    @property
    def element(self) -> Element:
        """The number type of the values."""
        return element(self.base)

    @property
    def short(self) -> str:
        """Shortest spelling."""
        return self.name

    @property
    def weight_bits(self) -> int:
        """Bits of one stored value."""
        return self.element.bits

    def grouped_shape(self, matrix: Matrix) -> tuple[int, int, int]:
        """(output channels, blocks per channel, columns per block) after padding."""
        rows, columns = matrix
        return rows, -(-columns // self.size), self.size

    def storage(self, matrix: Matrix) -> Storage:
        """Exact size of a packed matrix of (output channels, columns)."""
        rows, blocks, size = self.grouped_shape(matrix)
        tensor_scale = 32 if self.scale == "e4m3" else 0
        return Storage(rows * blocks * size * self.weight_bits, rows * blocks * 8 + tensor_scale, 0)

    def refuses(self, matrix: Matrix) -> str | None:
        """Why this format is not offered for a matrix, or None: kernels take whole blocks only.

        >>> BLOCKS["mxfp4"].refuses((8, 48))
        '48 columns are no multiple of 32'
        """
        rows, columns = matrix
        if rows < 1 or columns < 1:
            return f"the matrix {rows} x {columns} is empty"
        return f"{columns} columns are no multiple of {self.size}" if columns % self.size else None

    def fallback(self, matrix: Matrix) -> str | None:
        """None: its runtimes refuse what this format refuses."""
        return None


BLOCKS: dict[str, BlockFormat] = {
    "mxfp4": BlockFormat("mxfp4", "e2m1", 32, "e8m0"),
    "mxfp8": BlockFormat("mxfp8", "e4m3", 32, "e8m0"),
    "nvfp4": BlockFormat("nvfp4", "e2m1", 16, "e4m3"),
}


def parse_block(parts: Sequence[str]) -> tuple[BlockFormat, tuple[str, ...]] | None:
    """Read a format from the parts of a scheme.

    >>> parse_block(["mxfp4", "rtn"])[1]
    ('rtn',)
    """
    named = [part for part in parts if part in BLOCKS]
    if not named:
        return None
    if len(named) > 1:
        raise SchemeError(f"Scheme must name its format once. Got {' and '.join(named)}. Drop one of them.")
    return BLOCKS[named[0]], tuple(part for part in parts if part not in BLOCKS)


MICROSCALING = Family(
    name="microscaling",
    grammar=f"({'|'.join(BLOCKS)})",
    summary="MXFP4 and MXFP8 (blocks of 32, one power of two each), NVFP4 (blocks of 16, one e4m3 scale each"
    " and one float32 scale per tensor).",
    codec="quant.codecs.microscaling",
    source="Rouhani et al. 2023, arXiv:2310.10537; OCP Microscaling Formats 1.0",
    parse=parse_block,
    examples=tuple(BLOCKS.values()),
)
