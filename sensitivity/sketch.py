"""Small stand-ins for large output changes that keep their inner products."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensitivity.estimators import keyed_generator, rademacher

SKETCH_FLOATS = 2**16
"""Length of a sketch: 256 KiB as float32. Inner products are off by about |a| |b| / sqrt(length)."""
LEAST_PROJECTED = 8


class Sketch:
    """Projects rows (n, k), given batch by batch, to `values` with E <values_a, values_b> = <a, b>.

    Exact while all rows fit. Otherwise each row has its outputs multiplied by its own random signs, is
    projected by one random sign matrix (k, r) / sqrt(r), and is added to its bucket. The row's signs make
    the errors of different rows uncorrelated, in the same bucket and in different ones. The same
    arguments give the same projection, so sketches of one session can be compared.
    """

    def __init__(self, rows: int, outputs: int, seed: int, floats: int = SKETCH_FLOATS) -> None:
        self._outputs, self._seed, self._position = outputs, seed, 0
        self.exact = rows * outputs <= floats
        self._width = outputs if self.exact else min(outputs, max(LEAST_PROJECTED, floats // max(rows, 1)))
        self._buckets = rows if self.exact else min(rows, max(1, floats // self._width))
        self._sums = np.zeros((self._buckets, self._width))
        self._projection = None if self.exact else self._random_projection()

    @property
    def values(self) -> NDArray[np.float64]:
        """The sketch (d,)."""
        return self._sums.reshape(-1)

    def add(self, rows: Tensor) -> None:
        """Take in the next rows (m, k)."""
        projected = rows if self._projection is None else self._signed(rows) @ self._projection.to(rows)
        places = (self._position + np.arange(len(rows))) % self._buckets
        np.add.at(self._sums, places, projected.detach().to("cpu", torch.float64).numpy())
        self._position += len(rows)

    def _signed(self, rows: Tensor) -> Tensor:
        bits = keyed_generator((self._seed, "signs", self._position)).bytes(rows.numel() // 8 + 1)
        signs = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=rows.numel()).reshape(rows.shape)
        return rows * (torch.from_numpy(signs).to(rows) * 2 - 1)

    def _random_projection(self) -> Tensor:
        signs = rademacher(self._outputs * self._width, (self._seed, "projection"))
        return torch.from_numpy(signs.reshape(self._outputs, self._width) / self._width**0.5)
