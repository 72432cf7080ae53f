"""Schemes: what a decision chooses, and the one grammar that spells them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quant.activations import ACTIVATIONS, ActivationFormat, parse_activation
from quant.catalog import DEFAULT_QUANTIZER, QUANTIZERS
from quant.formats import FORMATS, Format
from quant.layers import Decided
from quant.storage import Matrix, SchemeError, Storage

__all__ = ["Scheme", "SchemeError", "grammar", "parse_scheme", "parse_schemes"]

LONGEST = 100


@dataclass(frozen=True)
class Scheme:
    """Weight format, quantizer, and what the layer's inputs are rounded to; None leaves them as they are.

    >>> scheme = parse_scheme("w4")
    >>> scheme.name, scheme.spelled
    ('w4', 'w4-channel-sym-float16-mse_clip')
    >>> parse_scheme("aint8-w8").name
    'w8-aint8'
    """

    weight: Format
    quantizer: str = DEFAULT_QUANTIZER
    activation: ActivationFormat | None = None

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise SchemeError(
                f"Quantizer must be one of {', '.join(QUANTIZERS)}. Got {self.quantizer!r}."
                f" Use {DEFAULT_QUANTIZER!r}."
            )
        if self.weight.family not in QUANTIZERS[self.quantizer].families:
            raise SchemeError(
                f"Quantizer must support the format family {self.weight.family!r}. Got {self.quantizer!r},"
                f" which supports {', '.join(QUANTIZERS[self.quantizer].families)}. Choose another quantizer."
            )

    @property
    def name(self) -> str:
        """Canonical short spelling: defaults left out, parts in the order of the grammar."""
        quantizer = "" if self.quantizer == DEFAULT_QUANTIZER else f"-{self.quantizer}"
        return f"{self.weight.short}{quantizer}{self._activation}"

    @property
    def spelled(self) -> str:
        """Full spelling, every part written out."""
        return f"{self.weight.name}-{self.quantizer}{self._activation}"

    @property
    def _activation(self) -> str:
        return "" if self.activation is None else f"-a{self.activation.name}"

    @property
    def weight_bits(self) -> int:
        """Bits of one stored value, without scales and zero points."""
        return self.weight.weight_bits

    @property
    def needs_inputs(self) -> bool:
        """Whether its quantizer must be given statistics of the layer's inputs."""
        return QUANTIZERS[self.quantizer].needs_inputs

    @property
    def needs_range(self) -> bool:
        """Whether its activations must be given the range of the layer's inputs."""
        return self.activation is not None and self.activation.static

    @property
    def needs_calibration(self) -> bool:
        """Whether anything of it is chosen from calibration data."""
        return self.needs_inputs or self.needs_range

    @property
    def adds(self) -> bool:
        """Whether its quantizer stores tensors beside those of the format."""
        return QUANTIZERS[self.quantizer].adds is not None

    def storage(self, matrix: Matrix) -> Storage:
        """Exact size of what is stored for a matrix of (output channels, columns).

        The format's values, scales and zero points, what the quantizer adds, and the activations' scale.
        """
        adds = QUANTIZERS[self.quantizer].adds
        added = 0 if adds is None else adds(matrix)
        scale = 0 if self.activation is None else self.activation.stored_bits
        return replace(self.weight.storage(matrix), added_bits=added + scale)

    def refuses(self, layer: Decided) -> str | None:
        """Why this scheme is not offered for a layer, or None."""
        if self.needs_inputs and layer.op == "embedding":
            return f"an embedding has no inputs to multiply, which {self.quantizer} goes by; use mse_clip"
        refused = None if self.activation is None else self.activation.refuses(layer.op, layer.matrix[1])
        return refused or self.weight.refuses(layer.matrix)

    def as_json(self) -> dict[str, str | int | None]:
        """Plain values for documents and digests."""
        return {
            "name": self.name,
            "spelled": self.spelled,
            "weight_bits": self.weight_bits,
            "quantizer": self.quantizer,
            "quantizer_version": QUANTIZERS[self.quantizer].version,
            "activation": None if self.activation is None else self.activation.name,
        }


def grammar() -> str:
    """The grammar of all families, one per line; `<activation>` is a name of ACTIVATIONS.

    >>> grammar().splitlines()[2]
    '(mxfp4|mxfp8|nvfp4)[-mse_clip|-rtn][-a<activation>]'
    """
    return "\n".join(
        family.grammar + _writers(family.name) + "[-a<activation>]" for family in FORMATS.values()
    )


def _writers(family: str) -> str:
    names = [f"-{name}" for name, quantizer in QUANTIZERS.items() if family in quantizer.families]
    return f"[{'|'.join(names)}]"


def _spellings() -> str:
    return grammar().replace("\n", ", or ")


def parse_scheme(text: str) -> Scheme:
    """Read one scheme; parts in any order, defaults: channel, sym, float16, mse_clip.

    >>> parse_scheme("w4-asym-g32").name
    'w4-g32-asym'

    Raises SchemeError that says what is offered.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
        raise SchemeError(f"Scheme must be a short text like 'w4'. Got {text!r:.60}. Use {_spellings()}.")
    parts = text.strip().lower().split("-")
    try:
        return _read(text, parts)
    except SchemeError as error:
        if repr(text) in str(error):
            raise
        raise SchemeError(f"{error} (In scheme {text!r}.)") from None


def _read(text: str, parts: Sequence[str]) -> Scheme:
    activation, others = parse_activation(tuple(parts))
    for family in FORMATS.values():
        parsed = family.parse(others)
        if parsed is not None:
            weight, rest = parsed
            return Scheme(weight, _quantizer(text, rest), activation)
    raise SchemeError(
        f"Scheme must be spelled {_spellings()}. Got {text!r}. Use for example 'w4' or 'w4-g128'."
    )


def _quantizer(text: str, rest: Sequence[str]) -> str:
    unknown = [part for part in rest if part not in QUANTIZERS]
    if unknown:
        raise SchemeError(
            f"Scheme must be spelled {_spellings()}. Got {text!r} with the unknown part {unknown[0]!r}."
            f" Drop or correct it; activations are {', '.join(ACTIVATIONS)}."
        )
    if len(rest) > 1:
        raise SchemeError(f"Scheme must name its quantizer once. Got {text!r}. Drop all but one.")
    return rest[0] if rest else DEFAULT_QUANTIZER


def parse_schemes(text: str | Iterable[str]) -> tuple[Scheme, ...]:
    """Read a menu: names separated by commas, or an iterable of names; the order is kept.

    >>> [scheme.name for scheme in parse_schemes("w2, w4-channel")]
    ['w2', 'w4']

    Raises SchemeError when a scheme cannot be read, is listed twice, or the menu is empty.
    """
    items = text.split(",") if isinstance(text, str) else list(text)
    schemes = tuple(parse_scheme(item) for item in items if not isinstance(item, str) or item.strip())
    if not schemes:
        raise SchemeError("Schemes must name at least one scheme. Got none. Use for example 'w2,w3,w4,w8'.")
    names = [scheme.name for scheme in schemes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SchemeError(f"Schemes must differ. Got {', '.join(twice)} more than once. Drop the repetition.")
    return schemes
