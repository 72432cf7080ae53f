"""Estimators of anything that can be multiplied with. Front: for numpy arrays and torch tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Operator(Protocol):
    """A symmetric matrix known by its products: rows of vectors (m, n) in, their products (m, n) out."""

    def __call__(self, vectors: Any, /) -> Any:
        """The product with each row."""


@dataclass(frozen=True)
class Estimate:
    """A value with the standard error of its mean over `n` independent draws."""

    value: float
    stderr: float
    n: int

    @property
    def relative_error(self) -> float:
        """stderr / |value|; 0 for an exact zero, infinite for a zero that is not exact."""
        if self.stderr == 0:
            return 0.0
        return self.stderr / abs(self.value) if self.value else math.inf


def mean_estimate(draws: ArrayLike) -> Estimate:
    """Mean of independent draws (n,). One draw has an infinite standard error.

    >>> mean_estimate([1.0, 3.0])
    Estimate(value=2.0, stderr=1.0, n=2)
    """
    values = np.asarray(draws, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"draws must be a vector that is not empty. Got shape {values.shape}.")
    spread = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.inf
    return Estimate(float(values.mean()), spread, int(values.size))


def quadratic_forms(operator: Operator, probes: Any) -> NDArray[np.float64]:
    """z'Hz for each row z of `probes` (m, n); shape (m,)."""
    return np.asarray((probes * operator(probes)).sum(-1).tolist(), dtype=np.float64)


def hutchinson(operator: Operator, batches: Iterable[Any]) -> Estimate:
    """Trace of `operator` as the mean of z'Hz over all probes, given in batches (m, n).

    Unbiased for probes of mean 0 and covariance I. With Rademacher probes one draw has variance
    2 (||H||_F^2 - sum h_ii^2). Source: Hutchinson 1990.

    >>> hutchinson(lambda rows: rows @ np.diag([1.0, 2.0]), [np.array([[1.0, -1.0], [1.0, 1.0]])])
    Estimate(value=3.0, stderr=0.0, n=2)
    """
    return mean_estimate(np.concatenate([quadratic_forms(operator, probes) for probes in batches]))


def rademacher(size: int, key: Sequence[int | str]) -> NDArray[np.float64]:
    """Random signs (size,), a function of `key` alone: the same on every worker, in any order.

    >>> bool((rademacher(8, (0, "fc", 3)) == rademacher(8, (0, "fc", 3))).all())
    True
    """
    return keyed_generator(key).integers(0, 2, size=size).astype(np.float64) * 2 - 1


def keyed_generator(key: Sequence[int | str]) -> np.random.Generator:
    """A generator that depends on `key` alone, parts of a key being whole numbers or names."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    words = np.frombuffer(sha256(text.encode("utf-8")).digest(), dtype="<u4")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(word) for word in words])))
