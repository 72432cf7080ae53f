"""The block types of GGUF files that llama.cpp reads (Q4_0 ... Q8_0 and the K-quants)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant.storage import Family, Matrix, SchemeError, Storage

LAST_RESORT = "fp16"
SMALL_BLOCK = 32


@dataclass(frozen=True)
class GgufFormat:
    """Blocks of `size` columns with float16 scales; K-quants scale sub-blocks of `sub_size` by integers.

    A weight is scale * (code - offset), or scale * code - minimum where `minimum` is set. In K-quants scale
    and minimum of a sub-block are integers of `scale_bits` bits (signed without minimum) times the block's
    float16 scales. `instead` is the type llama.cpp takes where columns are no multiple of 256.

    >>> GGUF_TYPES["q4_k"].storage((2, 256)).bytes, GGUF_TYPES["q4_0"].storage((2, 256)).bytes
    (288, 288)
    """

    name: str
    bits: int
    size: int
    offset: int = 0
    sub_size: int = 0
    scale_bits: int = 0
    instead: str | None = None

    @property
    def family(self) -> str:
        """Key of FORMATS."""
        return "gguf"

    @property
    def short(self) -> str:
        """Shortest spelling."""
        return self.name

    @property
    def weight_bits(self) -> int:
        """Bits of one stored value."""
        return self.bits

    @property
    def minimum(self) -> bool:
        """Whether blocks store a minimum beside the scale."""
        return self.offset == 0

    @property
    def subs(self) -> int:
        """Sub-blocks of a block."""
        return self.size // self.sub_size if self.sub_size else 1

    @property
    def highest(self) -> int:
        """Largest code; codes start at 0."""
        return (1 << self.bits) - 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block.

        >>> [GGUF_TYPES[name].block_bytes for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")]
        [84, 110, 144, 176, 210, 34]
        """
        return self.storage((1, self.size)).bytes

    def grouped_shape(self, matrix: Matrix) -> tuple[int, int, int]:
        """(output channels, blocks per channel, columns per block) after padding."""
        rows, columns = matrix
        return rows, -(-columns // self.size), self.size

    def storage(self, matrix: Matrix) -> Storage:
        """Exact size of a packed matrix of (output channels, columns)."""
        rows, blocks, size = self.grouped_shape(matrix)
        scales = rows * blocks * (16 + self.subs * self.scale_bits)
        return Storage(rows * blocks * size * self.bits, scales, scales if self.minimum else 0)

    def refuses(self, matrix: Matrix) -> str | None:
        """Why this format is not offered for a matrix, or None: GGUF rows are whole blocks.

        >>> GGUF_TYPES["q4_k"].refuses((8, 576))
        '576 columns are no multiple of 256; llama.cpp would store q5_0'
        """
        rows, columns = matrix
        if rows < 1 or columns < 1:
            return f"the matrix {rows} x {columns} is empty"
        if columns % self.size == 0:
            return None
        other = self.fallback(matrix)
        outcome = f"llama.cpp would store {other}" if other else "llama.cpp stops"
        return f"{columns} columns are no multiple of {self.size}; {outcome}"

    def fallback(self, matrix: Matrix) -> str | None:
        """The scheme llama.cpp stores a refused matrix in; None for blocks of 32, where it stops.

        K-quants become a type with blocks of 32 where columns allow it, else fp16. Older releases take
        iq4_nl for q2_k and q3_k, which has the size of q4_0.

        >>> [GGUF_TYPES["q6_k"].fallback((8, columns)) for columns in (512, 576, 100)]
        [None, 'q8_0', 'fp16']
        """
        if matrix[1] % self.size == 0 or self.instead is None:
            return None
        return self.instead if matrix[1] % SMALL_BLOCK == 0 else LAST_RESORT


GGUF_TYPES: dict[str, GgufFormat] = {
    fmt.name: fmt
    for fmt in (
        GgufFormat("q4_0", bits=4, size=32, offset=8),
        GgufFormat("q4_1", bits=4, size=32),
        GgufFormat("q5_0", bits=5, size=32, offset=16),
        GgufFormat("q5_1", bits=5, size=32),
        GgufFormat("q8_0", bits=8, size=32, offset=128),
        GgufFormat("q2_k", bits=2, size=256, sub_size=16, scale_bits=4, instead="q4_0"),
        GgufFormat("q3_k", bits=3, size=256, offset=4, sub_size=16, scale_bits=6, instead="q4_0"),
        GgufFormat("q4_k", bits=4, size=256, sub_size=32, scale_bits=6, instead="q5_0"),
        GgufFormat("q5_k", bits=5, size=256, sub_size=32, scale_bits=6, instead="q5_1"),
        GgufFormat("q6_k", bits=6, size=256, offset=32, sub_size=16, scale_bits=8, instead="q8_0"),
    )
}


def parse_gguf(parts: Sequence[str]) -> tuple[GgufFormat, tuple[str, ...]] | None:
    """Read a format from the parts of a scheme.

    >>> parse_gguf(["q4_k"])[0].bits
    4
    """
    named = [part for part in parts if part in GGUF_TYPES]
    if not named:
        return None
    if len(named) > 1:
        raise SchemeError(f"Scheme must name its format once. Got {' and '.join(named)}. Drop one of them.")
    return GGUF_TYPES[named[0]], tuple(part for part in parts if part not in GGUF_TYPES)


GGUF = Family(
    name="gguf",
    grammar=f"({'|'.join(GGUF_TYPES)})",
    summary="The block types of GGUF files: blocks of 32 with one float16 scale, and K-quants of 256 with"
    " integer scales per sub-block.",
    codec="quant.codecs.gguf_blocks",
    source="ggml-org/llama.cpp; decoding checked against the gguf package",
    parse=parse_gguf,
    examples=tuple(GGUF_TYPES.values()),
)
