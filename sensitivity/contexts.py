"""Contexts of samples: ranges of timesteps, or classes that the calibration data name. Front: numpy only.

A score of one context is stored under the names of metric and context: "sqnr@timestep:250-500", "ssim@code".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGN = "@"
RANGE = "timestep:"
LEAST_SAMPLES = 2
"""Of each context in each part: less has no standard error."""
CLASS = re.compile(r"[\w][\w .+/-]{0,63}")
"""What a class may be called."""


def in_context(metric: str, context: str) -> str:
    """The name of a metric in one context.

    >>> in_context("sqnr", "code"), without_context("sqnr@code"), without_context("sqnr")
    ('sqnr@code', 'sqnr', 'sqnr')
    """
    return f"{metric}{SIGN}{context}"


def without_context(metric: str) -> str:
    """The metric's own name."""
    return metric.partition(SIGN)[0]


def context_of(metric: str) -> str | None:
    """The context that a metric's name ends in; None without one."""
    return metric.partition(SIGN)[2] or None


def timestep_ranges(edges: Sequence[float]) -> tuple[str, ...]:
    """The contexts that rising edges, none of them negative, cut all timesteps into.

    >>> timestep_ranges([0.00001, 500])
    ('timestep:-0.00001', 'timestep:0.00001-500', 'timestep:500-')
    """
    texts = ["", *(np.format_float_positional(edge, trim="-") for edge in edges), ""]
    return tuple(f"{RANGE}{low}-{high}" for low, high in pairwise(texts))


def members(context: str, classes: Sequence[str] | None, steps: Sequence[float] | None) -> NDArray[np.bool_]:
    """Which samples are in a context, by the class or the timestep of each.

    Raises ValueError where the data do not tell.

    >>> members("timestep:-250", None, [10, 249, 250]).tolist()
    [True, True, False]
    """
    if context.startswith(RANGE):
        if steps is None:
            raise ValueError("a range of timesteps needs an input named timestep. Got none.")
        low, high = _bounds(context)
        found = np.asarray(steps, dtype=np.float64)
        return (found >= low) & (found < high)
    if classes is None:
        raise ValueError("contexts need calibration data that name one for each sample. Got none.")
    return np.array([name == context for name in classes], dtype=bool)


def classes_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of all samples of an inspection, sorted; () where the data name none."""
    return tuple(sorted({name for part in (facts.get("contexts") or {}).values() for name in part}))


def _bounds(context: str) -> tuple[float, float]:
    found = re.fullmatch(r"([0-9.]*)-([0-9.]*)", context.removeprefix(RANGE))
    if found is None:
        raise ValueError(f"a range of timesteps must be written {RANGE}250-500. Got {context!r:.80}.")
    try:
        return float(found[1] or -math.inf), float(found[2] or math.inf)
    except ValueError:
        raise ValueError(
            f"a range of timesteps must be written {RANGE}250-500. Got {context!r:.80}."
        ) from None
