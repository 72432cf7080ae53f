"""Estimators of anything that can be multiplied with. Front: for numpy arrays and torch tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """z'Hz for each row z of `probes` (m, n); shape (m,). Their mean is Hutchinson's estimate of the trace.

    Unbiased for probes of mean 0 and covariance I. With Rademacher probes one has variance
    2 (||H||_F^2 - sum h_ii^2). Source: Hutchinson 1990.

    >>> quadratic_forms(lambda rows: rows @ np.diag([1.0, 2.0]), np.array([[1.0, -1.0], [1.0, 1.0]])).tolist()
    [3.0, 3.0]
    """
    return np.asarray((probes * operator(probes)).sum(-1).tolist(), dtype=np.float64)


def xtrace_estimate(draws: NDArray[np.float64]) -> Estimate:
    """The mean of XTrace's draws (m,). Their variance over m counts what a pair of probes gives once, but it
    enters two draws: the variance is doubled. On random matrices the result is 1.2 to 1.8 times the true one.

    >>> draws, _ = xtrace_draws(lambda rows: rows @ np.diag([3.0, 0.0]), np.array([[1.0, 1.0], [1.0, -1.0]]))
    >>> xtrace_estimate(draws)
    Estimate(value=3.0, stderr=0.0, n=2)
    """
    plain = mean_estimate(draws)
    return Estimate(plain.value, plain.stderr * math.sqrt(2), plain.n)


def xtrace_draws(
    operator: Operator, probes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """XTrace's m unbiased draws, and the plain quadratic forms z'Az that come with them; both (m,).

    Draw i is Hutch++ with probe i on the rest and the range of A times all other probes: every probe serves
    both ends (Epperly, Tropp and Webber 2024, arXiv:2301.07825). Ranges are found within that of all probes,
    by small singular value decompositions, so A may have any rank.
    """
    products = operator(probes).T
    basis, triangle = np.linalg.qr(products)
    again = operator(basis.T).T
    inner, seen, crossed = basis.T @ again, basis.T @ probes.T, again.T @ probes.T
    forms = (probes.T * products).sum(0)
    draws = []
    for i, form in enumerate(forms):
        others = _range(np.delete(triangle, i, axis=1))
        inside = others @ (others.T @ seen[:, i])
        outside = form - 2 * crossed[:, i] @ inside + inside @ inner @ inside
        draws.append((others * (inner @ others)).sum() + outside)
    return np.array(draws), forms


def _range(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """An orthonormal basis of the columns' span, without directions that rounding made."""
    left, lengths, _ = np.linalg.svd(columns, full_matrices=False)
    kept = lengths > max(columns.shape) * np.finfo(np.float64).eps * lengths.max(initial=0.0)
    basis: NDArray[np.float64] = left[:, kept]
    return basis


@dataclass(frozen=True)
class Stratum:
    """What is known of one part of a sum: independent unbiased draws with the variance of their mean."""

    weight: float
    mean: float
    variance: float


def stratified(strata: Sequence[Stratum], parts: int, n: int) -> Estimate:
    """The weighted mean over `parts` parts of which `strata` were met at random, with `n` draws in all.

    The standard error covers the draws and the parts that were not met (finite population of `parts`).

    >>> stratified([Stratum(3.0, 1.0, 0.0), Stratum(1.0, 5.0, 0.64)], 2, 8)
    Estimate(value=2.0, stderr=0.2, n=8)
    """
    weights = np.array([part.weight for part in strata]) / sum(part.weight for part in strata)
    means = np.array([part.mean for part in strata])
    variance = float(weights**2 @ [part.variance for part in strata])
    if len(strata) < parts:
        between = float(means.var(ddof=1)) if len(strata) > 1 else math.inf
        variance += (1 - len(strata) / parts) * between / len(strata)
    return Estimate(float(weights @ means), math.sqrt(variance), n)


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
