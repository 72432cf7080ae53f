"""Limits and budgets as people write them: "3.5 bpw", "7 GiB", "bytes<=2 MiB,latency<=12 ms"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Literal, NoReturn

Relation = Literal["<=", ">="]

LARGEST = 2**63
BITS_PER_WEIGHT = "bits_per_weight"
BYTE_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    "kB": 1000,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
TIME_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9}
BPW_UNITS = {"bpw": 1}
EXAMPLES = (
    '"3.5 bpw", "7 GiB", "uniform w4", "bytes<=2 MiB", "latency<=12 ms", "bops<=4e9", "bytes<=0.25 of range"'
)

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,9})?"
_VALUE = re.compile(rf"(?P<number>{_NUMBER})\s*(?P<unit>%|[A-Za-zµ]+)?(?P<range>\s+of\s+range)?")
_LIMIT = re.compile(r"(?P<resource>[A-Za-z_][\w.\-]*)\s*(?P<relation><=|>=|≤|≥)\s*(?P<value>.*)", re.DOTALL)
_UNIFORM = re.compile(r"uniform\s+(?P<scheme>[\w.\-]+)")
_SUFFIXED = re.compile(r"(?P<name>.*[a-z])_(?:ns|us|ms|s|bytes|bits)")


class BudgetError(ValueError):
    """A budget or limit that cannot be read or cannot mean anything."""


@dataclass(frozen=True)
class Limit:
    """The total of one resource is at most (or at least) `value`, an exact number.

    With `of_range` the value is a ratio r from 0 to 1 and stands for low + r (high - low), where low and
    high are the smallest and largest totals that ties and pins leave possible (HAWQ-V3's way to state a
    limit). With `uniform`, the limit is the total of the plan that gives every layer that scheme. With
    `layers` it is about those layers alone, and `scope` is what they are called.
    """

    resource: str
    relation: Relation
    value: Fraction
    of_range: bool = False
    uniform: str = ""
    scope: str = field(default="", repr=False)
    layers: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def name(self) -> str:
        """What is limited: the resource, and of which layers if not of all."""
        return f"{self.resource}[{self.scope}]" if self.scope else self.resource

    def __post_init__(self) -> None:
        if self.of_range and not 0 <= self.value <= 1:
            raise BudgetError(f"A part of the range must be from 0 to 1. Got {_shown(self.value)}.")
        if not self.of_range and not 0 < self.value <= LARGEST:
            raise BudgetError(
                f"The limit on {self.resource} must be more than 0 and at most 2^63. "
                f"Got {_shown(self.value)}."
            )

    def __str__(self) -> str:
        if self.uniform:
            return f"{self.resource}{self.relation}uniform {self.uniform}"
        return f"{self.resource}{self.relation}{_shown(self.value)}{' of range' if self.of_range else ''}"


@dataclass(frozen=True)
class Budget:
    """Limits that hold together, and the text they were written as."""

    limits: tuple[Limit, ...]
    text: str


def parse_budget(text: str) -> Budget:
    """Reads one budget; commas mean "and".

    A bare amount takes its resource from its unit: `bpw` limits stored bits per weight, byte units limit
    `bytes`, time units limit `latency_ns`. KB, MB, GB, TB are powers of 1000 and KiB, MiB, GiB, TiB powers
    of 1024. "uniform w4" is the bytes of the plan that gives every layer w4. Raises BudgetError.

    >>> parse_budget("bytes<=2 MiB, latency<=12.5 ms").limits[1]
    Limit(resource='latency_ns', relation='<=', value=Fraction(12500000, 1), of_range=False, uniform='')
    """
    if not isinstance(text, str) or not text.strip():
        _refuse("A budget must not be empty.", text)
    return Budget(tuple(parse_limit(part) for part in text.split(",")), text.strip())


def parse_limits(texts: Iterable[str]) -> tuple[Limit, ...]:
    """All limits of several texts together; they hold at the same time."""
    return tuple(limit for text in texts for limit in parse_budget(text).limits)


def parse_limit(text: str) -> Limit:
    """Reads one limit, such as `bytes<=2 MiB`, `accuracy>=0.7` or `3.5 bpw`. Raises BudgetError.

    >>> parse_limit("3.5 bpw")
    Limit(resource='bits_per_weight', relation='<=', value=Fraction(7, 2), of_range=False, uniform='')
    """
    stripped = text.strip()
    named = _LIMIT.fullmatch(stripped)
    if named is None:
        return _bare_limit(stripped)
    relation: Relation = "<=" if named["relation"] in ("<=", "≤") else ">="
    if uniform := _UNIFORM.fullmatch(named["value"].strip()):
        resource = {"bpw": BITS_PER_WEIGHT, "latency": "latency_ns"}.get(named["resource"], named["resource"])
        return Limit(resource, relation, Fraction(1), uniform=uniform["scheme"])
    value, unit, of_range = _amount(named["value"].strip(), stripped)
    resource, factor = _named_resource(named["resource"], unit, stripped)
    return Limit(resource, relation, value * factor, of_range)


def parse_bytes(text: str) -> int:
    """Reads an amount of memory in whole bytes. Raises BudgetError.

    >>> parse_bytes("2 GiB"), parse_bytes("1.5 kB")
    (2147483648, 1500)
    """
    match = _VALUE.fullmatch(text.strip())
    value, unit, of_range = _amount(text.strip(), text) if match else (Fraction(0), None, False)
    if unit not in BYTE_UNITS or of_range or not 1 <= value * BYTE_UNITS[unit] <= LARGEST:
        _refuse(f"An amount of memory must be a number with a unit ({', '.join(BYTE_UNITS)}).", text)
    return int(value * BYTE_UNITS[unit])


def _bare_limit(text: str) -> Limit:
    if uniform := _UNIFORM.fullmatch(text):
        return Limit("bytes", "<=", Fraction(1), uniform=uniform["scheme"])
    value, unit, of_range = _amount(text, text)
    if of_range:
        _refuse("A part of the range must name its resource, as in bytes<=0.25 of range.", text)
    for units, resource in ((BPW_UNITS, BITS_PER_WEIGHT), (BYTE_UNITS, "bytes"), (TIME_UNITS, "latency_ns")):
        if unit is not None and unit in units:
            return Limit(resource, "<=", value * units[unit])
    return _refuse(f"A budget without a resource must end in a unit ({_units()}).", text)


def _amount(text: str, whole: str) -> tuple[Fraction, str | None, bool]:
    match = _VALUE.fullmatch(text)
    if match is None:
        _refuse("A limit must be a resource, <= or >=, and a number with an optional unit.", whole)
    value, unit, of_range = _exact(match["number"], whole), match["unit"], match["range"] is not None
    if of_range and unit not in (None, "%"):
        _refuse("A part of the range must be a ratio or a percentage.", whole)
    if unit == "%" and not of_range:
        _refuse('A percentage must be followed by "of range".', whole)
    if unit == "%":
        value, unit = value / 100, None
    return value, unit, of_range


def _exact(number: str, whole: str) -> Fraction:
    decimal = Decimal(number)
    if decimal and not -400 < decimal.adjusted() < 30:
        _refuse("A limit must be more than 0 and at most 2^63.", whole)
    return Fraction(decimal)


def _named_resource(name: str, unit: str | None, whole: str) -> tuple[str, int]:
    if name in ("bpw", BITS_PER_WEIGHT):
        return BITS_PER_WEIGHT, _factor(BPW_UNITS, unit, name, whole)
    if name == "bytes" or name.endswith("_bytes"):
        return name, _factor(BYTE_UNITS, unit, name, whole)
    if name.endswith("_ns"):
        return name, _factor(TIME_UNITS, unit, name, whole)
    if name == "latency" and unit is None:
        _refuse(f"A limit on latency must have a unit ({', '.join(TIME_UNITS)}).", whole)
    if unit in TIME_UNITS and _SUFFIXED.fullmatch(name) is None:
        return f"{name}_ns", TIME_UNITS[unit]
    return name, _factor({}, unit, name, whole)


def _factor(units: dict[str, int], unit: str | None, name: str, whole: str) -> int:
    if unit is None:
        return 1
    if unit not in units:
        if not units:
            _refuse(f"A limit on {name} must have no unit: {unit} goes with bytes or latency.", whole)
        _refuse(f"The unit of {name} must be one of {', '.join(units)}.", whole)
    return units[unit]


def _units() -> str:
    return ", ".join((*BPW_UNITS, *BYTE_UNITS, *TIME_UNITS))


def _shown(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else repr(float(value))


def close_names(wanted: str, names: Iterable[str]) -> str:
    """The names most like the wanted one, for an error message."""
    known = list(names)
    close = difflib.get_close_matches(wanted, known[:20_000], n=3, cutoff=0.5)
    shown = close or known[:5]
    more = "" if close or len(known) <= 5 else f" and {len(known) - 5} more"
    return f"{'Close names' if close else 'Known names'}: {', '.join(shown)}{more}."


def _refuse(must: str, got: object) -> NoReturn:
    text = repr(got)
    raise BudgetError(f"{must} Got {text if len(text) <= 80 else text[:77] + '...'}. Examples: {EXAMPLES}.")
