"""The small number types that blocks are made of, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from quant.storage import SchemeError

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""


@dataclass(frozen=True)
class Element:
    """One number type. Floats have `mantissa` bits and a `lowest_exponent`; a codebook has `levels`.

    Codes of floats are sign, exponent, mantissa from the highest bit down; codes of a codebook are indices
    of its levels. `highest` is the largest finite value. Rounding is to nearest, ties to even codes.
    """

    name: str
    bits: int
    highest: float
    mantissa: int = 0
    lowest_exponent: int = 0
    levels: tuple[float, ...] = ()
    source: str = ""

    @property
    def highest_exponent(self) -> int:
        """Exponent of the largest finite value.

        >>> [ELEMENTS[name].highest_exponent for name in ("e4m3", "e5m2", "e2m1")]
        [8, 15, 2]
        """
        return int(self.highest).bit_length() - 1


ELEMENTS: dict[str, Element] = {
    "e4m3": Element("e4m3", 8, 448.0, 3, -6, source="Micikevicius et al. 2022, arXiv:2209.05433"),
    "e5m2": Element("e5m2", 8, 57344.0, 2, -14, source="Micikevicius et al. 2022, arXiv:2209.05433"),
    "e2m1": Element("e2m1", 4, 6.0, 1, 0, source="Rouhani et al. 2023, arXiv:2310.10537"),
    "nf4": Element("nf4", 4, 1.0, levels=NF4_LEVELS, source="Dettmers et al. 2023, arXiv:2305.14314"),
}


def element(name: str) -> Element:
    """The element type of this name. Raises SchemeError for an unknown one."""
    if name not in ELEMENTS:
        raise SchemeError(f"Element type must be one of {', '.join(ELEMENTS)}. Got {name!r}. Use e4m3.")
    return ELEMENTS[name]
