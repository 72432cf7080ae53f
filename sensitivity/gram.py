"""The quadratic model of a plan's divergence from sketches of the outputs' changes. Front: numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensitivity.ranks import spearman, stepped_up

COLUMNS = 4096
"""So many columns are held in float64 at a time."""
PLANS = 200
"""Random plans whose ranking is compared."""

Floats = NDArray[np.float64]


def gram_matrix(sketches: NDArray[Any]) -> NDArray[np.float64]:
    """A (choices, choices) = S S' of the sketches (choices, d) that `gram_output` stores.

    The factor 1 / 2N is inside the sketches, so x'Ax estimates the divergence of the plan that picks
    the choices x. Raises ValueError for anything but a finite matrix.

    >>> gram_matrix(np.array([[1.0, 2.0], [0.0, -1.0]])).tolist()
    [[5.0, -2.0], [-2.0, 1.0]]
    """
    rows = np.asarray(sketches)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"sketches must be a finite matrix (choices, d). Got shape {rows.shape}.")
    gram = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], COLUMNS):
        part = rows[:, start : start + COLUMNS].astype(np.float64)
        gram += part @ part.T
    return gram


def positive_factor(gram: Floats) -> Floats:
    """F (choices, d) with FF' the positive semidefinite matrix that is nearest to `gram` (choices, choices).

    >>> bool(np.allclose((f := positive_factor(np.array([[2.0, 1.0], [1.0, 2.0]]))) @ f.T, [[2, 1], [1, 2]]))
    True
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    kept = values > values.max(initial=0.0) * 1e-14
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def shrunk_factor(products: NDArray[Any]) -> Floats:
    """(draws, layers, schemes) products g . dW -> factor (layers, schemes, draws) of A = v'v / 2N.

    What lies off the diagonal of a mean over few draws is noisy; the factor is scaled so that inner products
    shrink toward 0 by the share of their squares that noise explains (Ledoit and Wolf 2004, the diagonal as
    target). Readers take the diagonal from the scores, which are not shrunk.
    """
    rows = np.asarray(products, dtype=np.float64)
    flat = rows.reshape(len(rows), -1)
    kept = 1 - noise_share(flat)
    return np.asarray(np.moveaxis(rows, 0, -1) * np.sqrt(kept / (2 * len(rows))))


def noise_share(rows: Floats) -> float:
    """The share, 0 to 1, of the squared off-diagonal entries of rows'rows / n that is noise of the n draws.

    >>> noise_share(np.ones((50, 3)))
    0.0
    >>> noise_share(np.random.default_rng(0).standard_normal((50, 30))) > 0.9
    True
    """
    count = len(rows)
    if count < 2:
        return 1.0
    gram = rows @ rows.T if count < rows.shape[1] else rows.T @ rows
    squares = rows**2
    diagonal = squares.sum(axis=0) / count
    off = float((gram**2).sum()) / count**2 - float((diagonal**2).sum())
    each = float(((squares.sum(axis=1)) ** 2 - (squares**2).sum(axis=1)).sum())
    noise = (each / count - off) / (count - 1)
    return 1.0 if off <= 0 else float(np.clip(noise / off, 0.0, 1.0))


def plan_stability(products: NDArray[Any], seed: int) -> float:
    """How well two halves of the draws agree on the order of random plans: Spearman, stepped up to all draws.

    `products` is (samples, draws, layers, schemes). Plans share one multiset of schemes: they differ by who
    gets the bits, not by how many. 1 where there is nothing to rank.
    """
    rows = np.asarray(products, dtype=np.float64)
    layers, schemes = rows.shape[2:]
    if layers < 2 or schemes < 2:
        return 1.0
    plans = _random_plans(layers, schemes, seed)
    first, second = (_plan_values(rows[:, start::2], plans) for start in (0, 1))
    told = [bool(np.ptp(values) > 0) for values in (first, second)]
    if not all(told):
        return float(not any(told))
    return stepped_up(float(spearman(first[None], second[None])[0]))


def _random_plans(layers: int, schemes: int, seed: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    multiset = np.resize(np.arange(schemes), layers)
    return np.stack([generator.permutation(multiset) for _ in range(PLANS)])


def _plan_values(rows: Floats, plans: NDArray[np.int64]) -> Floats:
    """The predicted divergence of each plan, up to a factor."""
    flat = rows.reshape(-1, *rows.shape[2:])
    sums = np.stack([flat[:, np.arange(flat.shape[1]), plan].sum(axis=1) for plan in plans])
    return np.asarray((sums**2).mean(axis=1))
