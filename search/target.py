"""A wanted quality in place of a budget: "kl<=0.01", "perplexity<=12.5", "accuracy within 0.5 points".

target = parse_target("accuracy within 0.5 points")
reading = target.judge(plan, full_precision)        per-sample values of both
fewest(len(sizes), lambda i: ... .met)              the smallest size at which it is met
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from search.budget import Relation
from sensitivity.catalog import TASKS, USER_METRIC
from sensitivity.evidence import (
    GEOMETRIC,
    HIGHER_IS_BETTER,
    SHARES,
    Interval,
    mean_interval,
    paired_difference,
    quality_interval,
)

DIVERGENCE = "divergence"
DIVERGENCES = ("kl", "output_kl", DIVERGENCE, *sorted({task.divergence for task in TASKS.values()} - {"kl"}))
"""Names of what plans are compared by, whatever a task calls it."""
QUALITIES = tuple(sorted({name for task in TASKS.values() for name in task.quality} | {USER_METRIC}))
EXAMPLES = '"kl<=0.01", "perplexity within 2 %", "accuracy>=0.97", "accuracy within 0.5 points"'

_NUMBER = r"(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?)"
_ABSOLUTE = re.compile(rf"(?P<name>\w+)\s*(?P<relation><=|>=|≤|≥)\s*{_NUMBER}")
_WITHIN = re.compile(rf"(?P<name>\w+)\s+within\s+{_NUMBER}\s*(?P<unit>points?|%)")

Unit = Literal["", "points", "%"]


class TargetError(ValueError):
    """A target that cannot be read or cannot mean anything."""


@dataclass(frozen=True)
class Reading:
    """What a plan measures against a target, in the target's unit.

    `met` by the mean; `sure` where the whole interval meets it; `excess` is what is lost over what may be
    lost: 0 at full precision, 1 at the target.
    """

    interval: Interval
    met: bool
    sure: bool
    excess: float


@dataclass(frozen=True)
class Target:
    """A quality `name` at most (at least) `value`; with a `unit`, lost against full precision by at most
    `value` points (hundredths of a share) or percent.
    """

    text: str
    name: str
    relation: Relation
    value: float
    unit: Unit = ""

    def judge(self, plan: ArrayLike, full: ArrayLike) -> Reading:
        """The reading of per-sample values (n,) of a plan; `full` are those of full precision, zeros for the
        divergence. Raises ValueError as the intervals do.
        """
        interval = self._interval(plan, full)
        sign = 1.0 if self.relation == "<=" else -1.0
        worst = interval.high if self.relation == "<=" else interval.low
        met, sure = sign * interval.mean <= sign * self.value, sign * worst <= sign * self.value
        start = 0.0 if self.unit else _value(self.name, full).mean
        allowed, lost = sign * (self.value - start), sign * (interval.mean - start)
        excess = lost / allowed if allowed > 0 else (0.0 if met else math.inf)
        return Reading(interval, met, sure, excess)

    def _interval(self, plan: ArrayLike, full: ArrayLike) -> Interval:
        if not self.unit:
            return _value(self.name, plan)
        sign = -1.0 if self.name in HIGHER_IS_BETTER else 1.0
        if self.unit == "points":
            return _mapped(paired_difference(plan, full), lambda value: 100 * sign * value, sign)
        if self.name in GEOMETRIC:
            logs = paired_difference(np.log(np.asarray(plan)), np.log(np.asarray(full)))
            return _mapped(logs, lambda value: 100 * math.expm1(value), 1.0)
        base = abs(_value(self.name, full).mean) or math.inf
        return _mapped(paired_difference(plan, full), lambda value: 100 * sign * value / base, sign)


def parse_target(text: str) -> Target:
    """Reads one target. Raises TargetError.

    >>> parse_target("accuracy within 0.5 points")
    Target(text='accuracy within 0.5 points', name='accuracy', relation='<=', value=0.5, unit='points')
    >>> parse_target("output_kl <= 1e-2").name
    'divergence'
    """
    stripped = text.strip()
    if found := _WITHIN.fullmatch(stripped):
        return _within(found, stripped)
    found = _ABSOLUTE.fullmatch(stripped)
    if found is None:
        _refuse("A target must be a quality with <=, >= or within, and a number.", text)
    name, relation = _name(found["name"], text), ("<=" if found["relation"] in ("<=", "≤") else ">=")
    wanted = ">=" if name in HIGHER_IS_BETTER else "<="
    if relation != wanted:
        _refuse(f"A target on {found['name']} must be {wanted} a number.", text)
    return Target(stripped, name, wanted, _positive(found["number"], text))  # type: ignore[arg-type]


def fewest(count: int, met: Callable[[int], bool]) -> int | None:
    """The smallest of `count` sizes at which it is met, by bisection; None where the largest does not do.

    Where it is not monotone: a size at which it is met, the tried one below which did not meet it.

    >>> fewest(100, lambda size: size >= 37), fewest(3, lambda size: False)
    (37, None)
    """
    if not count or not met(count - 1):
        return None
    low, high = -1, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return high


def _within(found: re.Match[str], text: str) -> Target:
    name = _name(found["name"], text)
    unit: Unit = "%" if found["unit"] == "%" else "points"
    if name == DIVERGENCE:
        _refuse("A target within something must be on a quality that full precision has.", text)
    if unit == "points" and name not in SHARES:
        _refuse(f"A target within points must be on one of {', '.join(sorted(SHARES))}; use %.", text)
    return Target(text, name, "<=", _positive(found["number"], text), unit)


def _name(name: str, text: str) -> str:
    if name in DIVERGENCES:
        return DIVERGENCE
    if name not in QUALITIES:
        _refuse(f"A target must be on one of {', '.join((*DIVERGENCES, *QUALITIES))}.", text)
    return name


def _positive(number: str, text: str) -> float:
    value = float(number)
    if not 0 < value < math.inf:
        _refuse("The number of a target must be more than 0.", text)
    return value


def _value(name: str, values: ArrayLike) -> Interval:
    return mean_interval(values) if name == DIVERGENCE else quality_interval(name, values)


def _mapped(interval: Interval, change: Callable[[float], float], sign: float) -> Interval:
    """The interval of a monotone change, falling for a negative `sign`; the error by its mean slope."""
    ends = change(interval.low), change(interval.high)
    low, high = ends if sign > 0 else ends[::-1]
    reach = interval.high - interval.low
    stderr = interval.stderr * (high - low) / reach if reach > 0 else 0.0
    return Interval(change(interval.mean), stderr, low, high, interval.n)


def _refuse(must: str, got: str) -> NoReturn:
    raise TargetError(f"{must} Got {got!r:.80}. Examples: {EXAMPLES}.")
