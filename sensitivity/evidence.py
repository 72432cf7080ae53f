"""Intervals and the evidence document of a plan. Front: numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sensitivity.spec import Json

SHARES = frozenset({"accuracy"})
HIGHER_IS_BETTER = SHARES | {"ssim", "sqnr"}
GEOMETRIC = frozenset({"perplexity"})
"""Qualities whose mean over samples is geometric: perplexity is the exponential of the mean loss."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` samples with its standard error and a 95 % interval [low, high]."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, Json]:
        """Plain JSON."""
        return {"mean": self.mean, "stderr": self.stderr, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class MeasuredPlan:
    """One plan as measured on the reporting part: per-sample divergence and quality, float64 (n,)."""

    name: str
    bytes: int
    bits_per_weight: float
    within_limits: bool
    divergence: NDArray[np.float64]
    quality: Mapping[str, NDArray[np.float64]]


def mean_interval(values: ArrayLike) -> Interval:
    """Mean of independent samples (n,) with Student's 95 % interval.

    Raises ValueError below 2 samples or if one is not finite.

    >>> interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    >>> interval.mean, round(interval.stderr, 4), round(interval.high, 2)
    (2.5, 0.6455, 4.55)
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) < 2 or not np.isfinite(numbers).all():
        raise ValueError(f"values must be at least 2 finite numbers. Got shape {numbers.shape}.")
    mean, stderr = float(numbers.mean()), float(numbers.std(ddof=1) / math.sqrt(len(numbers)))
    reach = student_quantile(len(numbers) - 1) * stderr
    return Interval(mean, stderr, mean - reach, mean + reach, len(numbers))


def quality_interval(name: str, values: ArrayLike) -> Interval:
    """As `mean_interval`; perplexities are averaged geometrically (stderr by the delta method), shares of
    right answers have Wilson's interval, which stays within 0 and 1.
    """
    if name in SHARES:
        return share_interval(values)
    if name not in GEOMETRIC:
        return mean_interval(values)
    logs = mean_interval(np.log(np.asarray(values, dtype=np.float64)))
    mean = math.exp(logs.mean)
    return Interval(mean, mean * logs.stderr, math.exp(logs.low), math.exp(logs.high), logs.n)


def share_interval(values: ArrayLike) -> Interval:
    """Share of ones among zeros and ones (n,) with Wilson's 95 % interval (Wilson 1927).

    >>> interval = share_interval([1.0] * 20)
    >>> interval.mean, round(interval.low, 3), interval.high
    (1.0, 0.839, 1.0)
    """
    plain = mean_interval(values)
    z = NormalDist().inv_cdf(0.975)
    shrink = 1 + z * z / plain.n
    center = (plain.mean + z * z / (2 * plain.n)) / shrink
    reach = z / shrink * math.sqrt(plain.mean * (1 - plain.mean) / plain.n + (z / (2 * plain.n)) ** 2)
    return Interval(plain.mean, plain.stderr, max(0.0, center - reach), min(1.0, center + reach), plain.n)


def paired_difference(a: ArrayLike, b: ArrayLike) -> Interval:
    """Interval of mean(a - b), sample by sample (n,): positive throughout means a is larger for certain.

    Raises ValueError when the lengths differ.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"paired values must have the same length. Got {left.shape} and {right.shape}.")
    return mean_interval(left - right)


def student_quantile(freedom: int, level: float = 0.975) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees of freedom, else by bisection of the exact density.

    >>> [round(student_quantile(n), 3) for n in (1, 2, 5, 63)]
    [12.706, 4.303, 2.571, 1.998]
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1. Got {freedom}.")
    if freedom == 1:
        return math.tan(math.pi * (level - 0.5))
    if freedom == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    return _by_bisection(freedom, level)


def _by_bisection(freedom: int, level: float) -> float:
    low, high = NormalDist().inv_cdf(level), student_quantile(2, level)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + _area_from_zero(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _area_from_zero(end: float, freedom: int, steps: int = 400) -> float:
    """Integral of the density over [0, end] by Simpson's rule."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    points = np.linspace(0.0, end, steps + 1)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(points**2 / freedom))
    weights = np.ones(steps + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * density).sum() * end / steps / 3)


def evidence_document(
    measure: str,
    plan: MeasuredPlan,
    rivals: Sequence[MeasuredPlan],
    full_precision: Mapping[str, NDArray[np.float64]],
    part: str = "reporting",
) -> dict[str, Json]:
    """The evidence of a plan: its quality beside its rivals', all on the same samples.

    `full_precision` holds the full model's per-sample quality. A difference is rival minus plan in
    divergence, so a positive interval says that the plan is better. The verdict counts the uniform
    rivals within the limits (names that start with "uniform ").
    """
    entries = [_entry(plan, None)] + [_entry(rival, plan) for rival in rivals]
    uniform = [e for e in entries[1:] if e["name"].startswith("uniform ") and e["within_limits"]]
    quality = {name: quality_interval(name, values).as_json() for name, values in full_precision.items()}
    return {
        "part": part,
        "samples": len(plan.divergence),
        "measure": measure,
        "full_precision": {"quality": quality},
        "entries": entries,
        "verdict": {
            "beats_all_uniform": bool(uniform) and all(e["difference"]["low"] > 0 for e in uniform),
            "rivals": [e["name"] for e in uniform],
        },
    }


def _entry(measured: MeasuredPlan, plan: MeasuredPlan | None) -> dict[str, Any]:
    difference = None if plan is None else paired_difference(measured.divergence, plan.divergence).as_json()
    return {
        "name": measured.name,
        "bytes": measured.bytes,
        "bits_per_weight": measured.bits_per_weight,
        "within_limits": measured.within_limits,
        "divergence": mean_interval(measured.divergence).as_json(),
        "quality": {name: quality_interval(name, v).as_json() for name, v in measured.quality.items()},
        "difference": difference,
    }
