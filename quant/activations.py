"""What a layer's inputs are rounded to before they are multiplied: a part of a scheme."""

from __future__ import annotations

from dataclasses import dataclass

from quant.elements import Element, element
from quant.storage import SchemeError

MULTIPLYING = ("linear", "transformers_conv1d", "conv1d", "conv2d")
"""Operations whose input can be rounded; for the others there is nothing to multiply."""
TOKENWISE = ("linear", "transformers_conv1d")
"""Operations whose input is one vector per token."""
STATIC_SCALE_BITS = 32
"""A scale that is known beforehand is stored as one float32 for the layer."""


@dataclass(frozen=True)
class Kind:
    """A number type for activations: `block` values along a token's features share a scale, 0 for all."""

    name: str
    bits: int
    block: int
    static: bool
    summary: str


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("int8", 8, 0, True, "symmetric integers from -128 to 127"),
        Kind("int4", 4, 0, True, "symmetric integers from -8 to 7"),
        Kind("fp8", 8, 0, True, "e4m3, up to 448"),
        Kind("mxfp8", 8, 32, False, "e4m3 in blocks of 32, each with a power of two"),
        Kind("nvfp4", 4, 16, True, "e2m1 in blocks of 16, each with an e4m3 scale, and one float32 scale"),
    )
}


@dataclass(frozen=True)
class ActivationFormat:
    """How a layer's input is rounded.

    Dynamic: scales are taken from the values at run time, for each token (linear layers) or each sample
    (convolutions). Static: one float32 scale for the layer, chosen from calibration data and stored. The
    block scales of mxfp8 and nvfp4 are always taken at run time: static nvfp4 keeps its float32 scale.

    >>> ActivationFormat("fp8", static=True).name, ActivationFormat("nvfp4").bits
    ('fp8s', 4)
    """

    kind: str
    static: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SchemeError(f"Activation must be one of {', '.join(KINDS)}. Got {self.kind!r}. Use int8.")
        if self.static and not KINDS[self.kind].static:
            raise SchemeError(
                f"Activation must be dynamic where all scales belong to blocks. Got {self.kind}s."
                f" Use {self.kind}."
            )

    @property
    def name(self) -> str:
        """The kind, with an s if it is static."""
        return f"{self.kind}s" if self.static else self.kind

    @property
    def bits(self) -> int:
        """Bits of one value, without scales."""
        return KINDS[self.kind].bits

    @property
    def block(self) -> int:
        """Features of a token that share a scale; 0 where all of them do."""
        return KINDS[self.kind].block

    @property
    def element(self) -> Element | None:
        """The float type of the values; None for integers."""
        if self.kind.startswith("int"):
            return None
        return element("e2m1" if self.kind == "nvfp4" else "e4m3")

    @property
    def stored_bits(self) -> int:
        """Bits that a checkpoint stores for it: the static scale."""
        return STATIC_SCALE_BITS if self.static else 0

    @property
    def summary(self) -> str:
        """One sentence."""
        scale = "one scale per token (convolutions: per sample), taken at run time"
        if self.static:
            scale = "one scale per layer, chosen from calibration data"
        return f"{KINDS[self.kind].summary}; {scale}" if not self.block else self._blocks(scale)

    def _blocks(self, scale: str) -> str:
        return KINDS[self.kind].summary if self.kind == "mxfp8" else f"{KINDS[self.kind].summary}: {scale}"

    def refuses(self, op: str, columns: int) -> str | None:
        """Why a layer's input is not rounded so, or None. `columns` are those of its weight matrix.

        >>> ActivationFormat("int8").refuses("embedding", 64)
        'an embedding layer looks rows up and multiplies no activations'
        >>> ActivationFormat("nvfp4").refuses("linear", 40)
        'nvfp4 activations need columns in multiples of 16, not 40'
        """
        if op not in MULTIPLYING:
            what = (
                "looks rows up and multiplies no activations" if op == "embedding" else "has no such kernel"
            )
            return f"an {op} layer {what}"
        if self.block and op not in TOKENWISE:
            return f"{self.kind} activations come in blocks of a token's features; a {op} layer has no tokens"
        if self.block and columns % self.block:
            return f"{self.kind} activations need columns in multiples of {self.block}, not {columns}"
        return None


ACTIVATIONS: dict[str, ActivationFormat] = {
    fmt.name: fmt
    for kind in KINDS.values()
    for fmt in (
        ActivationFormat(kind.name, static) for static in ((False, True) if kind.static else (False,))
    )
}
"""All activation formats by name."""


def parse_activation(parts: tuple[str, ...]) -> tuple[ActivationFormat | None, tuple[str, ...]]:
    """The activation format among the parts of a scheme's spelling, and the other parts.

    >>> parse_activation(("w8", "aint8"))
    (ActivationFormat(kind='int8', static=False), ('w8',))
    """
    found = [part for part in parts if part[:1] == "a" and part[1:] in ACTIVATIONS]
    if len(found) > 1:
        raise SchemeError(
            f"Scheme must name its activations once. Got {found[0]!r} and {found[1]!r}. Drop one of them."
        )
    rest = tuple(part for part in parts if part not in found)
    return (ACTIVATIONS[found[0][1:]] if found else None), rest
