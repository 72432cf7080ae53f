"""Schemes: what a decision chooses, and the one grammar that spells them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, cast

from quant.activations import ACTIVATIONS, TOKENWISE, ActivationFormat, parse_activation
from quant.catalog import DEFAULT_QUANTIZER, QUANTIZERS
from quant.formats import FORMATS, Format
from quant.layers import Decided
from quant.storage import Matrix, SchemeError, Storage

if TYPE_CHECKING:
    from quant.adjusted import Adjusted
    from quant.catalog import Quantize
    from quant.packing import Encoded

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
    base: str | None = None
    parameter: int = 0

    def __post_init__(self) -> None:
        _check_quantizer(self.quantizer, self.weight)
        adjusts = QUANTIZERS[self.quantizer].adjusts
        if (adjusts is None) != (self.base is None):
            raise SchemeError(
                "A base quantizer must be given for quantizers that let another one round, and only then."
                f" Got {self.quantizer!r} with base {self.base!r}. Use {DEFAULT_QUANTIZER!r}."
            )
        most = 0 if adjusts is None or adjusts.parameter is None else adjusts.most
        if not min(1, most) <= self.parameter <= most:
            spelling = QUANTIZERS[self.quantizer].spelling
            number = f"a number from 1 to {most}" if most else "no number"
            raise SchemeError(
                f"Quantizer must be spelled {spelling}, with {number}."
                f" Got '{self.quantizer}{self.parameter or ''}'. Correct it."
            )
        if self.divides_inputs and self.activation is None:
            raise SchemeError(
                f"Quantizer {self.quantizer} must be part of a scheme that rounds activations. Got none."
                " Add an activation format, for example aint8, or use awq."
            )
        if self.base is not None:
            _check_quantizer(self.base, self.weight)
            if QUANTIZERS[self.base].adjusts is not None:
                raise SchemeError(
                    f"Scheme must name one of {', '.join(_adjusting())} at most."
                    f" Got {self.base!r} and {self.quantizer!r}. Drop one of them."
                )

    @property
    def name(self) -> str:
        """Canonical short spelling: defaults left out, parts in the order of the grammar."""
        adjusts = QUANTIZERS[self.quantizer].adjusts
        whole = f"{self.quantizer}{adjusts.default}" if adjusts is not None and adjusts.default else None
        words = (self.quantizer if word == whole else word for word in self._words)
        return "-".join((self.weight.short, *(word for word in words if word != DEFAULT_QUANTIZER)))

    @property
    def spelled(self) -> str:
        """Full spelling, every part written out."""
        return "-".join((self.weight.name, *self._words))

    @property
    def _words(self) -> tuple[str, ...]:
        base = () if self.base is None else (self.base,)
        activation = () if self.activation is None else (f"a{self.activation.name}",)
        return (*base, f"{self.quantizer}{self.parameter or ''}", *activation)

    @property
    def quantizers(self) -> dict[str, int]:
        """The quantizers that take part, with their versions."""
        names = (self.quantizer,) if self.base is None else (self.base, self.quantizer)
        return {name: QUANTIZERS[name].version for name in names}

    @property
    def weight_bits(self) -> int:
        """Bits of one stored value, without scales and zero points."""
        return self.weight.weight_bits

    @property
    def needs_inputs(self) -> bool:
        """Whether a quantizer of it must be given statistics of the layer's inputs."""
        return any(QUANTIZERS[name].needs_inputs for name in self.quantizers)

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
        return self.base is not None

    @property
    def divides_inputs(self) -> bool:
        """Whether the layer's inputs are divided by stored scales before they are rounded."""
        adjusts = QUANTIZERS[self.quantizer].adjusts
        return adjusts is not None and adjusts.divides_inputs

    @property
    def of_weights(self) -> Scheme:
        """A scheme that gives the same weights, the same for all activation formats that do not matter."""
        return self if self.divides_inputs else replace(self, activation=None)

    def storage(self, matrix: Matrix) -> Storage:
        """Exact size of what is stored for a matrix of (output channels, columns).

        The format's values, scales and zero points, what the quantizer adds, and the activations' scale.
        """
        adjusts = QUANTIZERS[self.quantizer].adjusts
        added = 0 if adjusts is None else adjusts.bits(matrix, self.parameter)
        scale = 0 if self.activation is None else self.activation.stored_bits
        return replace(self.weight.storage(matrix), added_bits=added + scale)

    def load(self) -> Callable[..., Encoded | Adjusted]:
        """The function that quantizes (weight matrix, format, inputs or None); importing it loads torch."""
        quantize = QUANTIZERS[self.quantizer].load()
        if self.base is None:
            return cast("Quantize", quantize)
        return partial(quantize, base=QUANTIZERS[self.base].load(), parameter=self.parameter)

    def refuses(self, layer: Decided) -> str | None:
        """Why this scheme is not offered for a layer, or None."""
        adjusts = QUANTIZERS[self.quantizer].adjusts
        features = layer.op in TOKENWISE or not self.divides_inputs
        reasons = (
            None if features else f"a {layer.op} layer has no features, which {self.quantizer} divides",
            None if self.activation is None else self.activation.refuses(layer.op, layer.matrix[1]),
            None if adjusts is None else adjusts.refuses(layer.matrix, self.parameter),
            self.weight.refuses(layer.matrix),
        )
        return next((reason for reason in reasons if reason is not None), None)

    def as_json(self) -> dict[str, str | int | None]:
        """Plain values for documents and digests; those of a base quantizer only where there is one."""
        base: dict[str, str | int | None] = {}
        if self.base is not None:
            base = {"base": self.base, "base_version": QUANTIZERS[self.base].version}
        return {
            **base,
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
    '(mxfp4|mxfp8|nvfp4)[-mse_clip|-rtn][-awq|-lorc<rank>|-smoothquant[<percent>]][-a<activation>]'
    """
    return "\n".join(
        family.grammar + _writers(family.name) + "[-a<activation>]" for family in FORMATS.values()
    )


def _writers(family: str) -> str:
    offered = [entry for entry in QUANTIZERS.values() if family in entry.families]
    rounding = [f"-{entry.spelling}" for entry in offered if entry.adjusts is None]
    adjusting = [f"-{entry.spelling}" for entry in offered if entry.adjusts is not None]
    return f"[{'|'.join(rounding)}]" + (f"[{'|'.join(adjusting)}]" if adjusting else "")


def _adjusting() -> list[str]:
    return [name for name, entry in QUANTIZERS.items() if entry.adjusts is not None]


def _check_quantizer(name: str, weight: Format) -> None:
    if name not in QUANTIZERS:
        raise SchemeError(
            f"Quantizer must be one of {', '.join(QUANTIZERS)}. Got {name!r}. Use {DEFAULT_QUANTIZER!r}."
        )
    if weight.family not in QUANTIZERS[name].families:
        raise SchemeError(
            f"Quantizer must support the format family {weight.family!r}. Got {name!r},"
            f" which supports {', '.join(QUANTIZERS[name].families)}. Choose another quantizer."
        )


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
    return _parsed(text)


@lru_cache(4096)
def _parsed(text: str) -> Scheme:
    """Kept: a menu is read in every request and for every layer."""
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
            return _scheme(text, weight, rest, activation)
    raise SchemeError(
        f"Scheme must be spelled {_spellings()}. Got {text!r}. Use for example 'w4' or 'w4-g128'."
    )


def _scheme(text: str, weight: Format, rest: Sequence[str], activation: ActivationFormat | None) -> Scheme:
    """The scheme whose quantizers the words `rest` name: one that rounds, one that adjusts, or both."""
    read = [_word(part) for part in rest]
    unknown = next((part for part, found in zip(rest, read, strict=True) if found is None), None)
    if unknown is not None:
        raise SchemeError(
            f"Scheme must be spelled {_spellings()}. Got {text!r} with the unknown part {unknown!r}."
            f" Drop or correct it; activations are {', '.join(ACTIVATIONS)}."
        )
    found = [item for item in read if item is not None]
    rounding = [item for item in found if QUANTIZERS[item[0]].adjusts is None]
    adjusting = [item for item in found if QUANTIZERS[item[0]].adjusts is not None]
    if len(rounding) > 1 or len(adjusting) > 1:
        raise SchemeError(f"Scheme must name its quantizer once. Got {text!r}. Drop all but one.")
    name, parameter = rounding[0] if rounding else (DEFAULT_QUANTIZER, 0)
    if not adjusting:
        return Scheme(weight, name, activation, parameter=parameter)
    return Scheme(weight, adjusting[0][0], activation, base=name, parameter=adjusting[0][1])


def _word(part: str) -> tuple[str, int] | None:
    """The quantizer that a word names, and its number, 0 without one; None for other words."""
    match = re.fullmatch(r"([a-z_]+)([1-9][0-9]{0,8})?", part)
    name = part if match is None else match[1]
    if name not in QUANTIZERS:
        return None
    adjusts = QUANTIZERS[name].adjusts
    number = match[2] if match is not None else None
    return name, int(number) if number else (0 if adjusts is None else adjusts.default)


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
