"""Kronecker factors of a layer's curvature: H ~ H_O (x) H_I for weights (rows, columns), by power iteration.

A factor is a symmetric matrix (groups, side, side), or its diagonal (groups, side) where the side is too
long for one. Groups are matrices of their own: experts, and the groups of a convolution. Given one factor of
norm 1, the other that is nearest to E[vec(G) vec(G)'] in the Frobenius norm is E[G H_I G'] or E[G' H_O G],
kept on the diagonal where it is one (Van Loan and Pitsianis 1993; Tseng et al. 2025, arXiv:2505.22988).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def curved(matrices: Tensor, factor: Tensor | None, *, full: bool) -> Tensor:
    """M F M' of each group's matrix M (groups, rows, columns), or its diagonal; no factor is the identity.

    >>> curved(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.0, 1.0]]), full=True)
    tensor([[[7.]]])
    """
    if factor is None:
        weighted = matrices
    elif factor.ndim == 2:
        weighted = matrices * factor[:, None, :]
    else:
        weighted = matrices @ factor
    return weighted @ matrices.mT if full else (weighted * matrices).sum(-1)


@dataclass(frozen=True)
class HalfSteps:
    """A layer's last two half steps by block of samples: means of G' H_O G and then of G H_I G'.

    columns  (blocks, groups, columns[, columns])
    rows     (blocks, groups, rows[, rows]), H_I the mean of `columns` over its norm
    weights  (blocks,), the blocks' shares of the samples
    """

    columns: Tensor
    rows: Tensor
    weights: Tensor

    def scores(self, errors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """tr(H_O dW H_I dW') of each dW (groups, rows, columns), and what each block says it is.

        The second, (blocks, errors), has the score as its weighted mean, and to first order the score's
        spread: a block moves both factors, and their scale once.
        """
        inner, outer = (torch.tensordot(self.weights, part, dims=1) for part in (self.columns, self.rows))
        lengths = _sums(inner.square()).sqrt()
        inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
        inner = inner * _spread(inverse, inner)
        columns = [block * _spread(inverse, block) for block in self.columns]
        values, influences = [], []
        for error in errors:
            at_rows = curved(error, inner, full=outer.ndim == 3)
            at_columns = curved(error.mT, outer, full=inner.ndim == 3)
            by_group = _sums(outer * at_rows)
            moved = [
                _sums(row * at_rows) + _sums(column * at_columns) - _sums(column * inner) * by_group
                for row, column in zip(self.rows, columns, strict=True)
            ]
            values.append(by_group.sum())
            influences.append(torch.stack(moved).sum(-1))
        return torch.stack(values), torch.stack(influences, -1)


def _sums(values: Tensor) -> Tensor:
    """Sums over everything but the groups (groups,)."""
    return values.reshape(len(values), -1).sum(-1)


def _spread(by_group: Tensor, like: Tensor) -> Tensor:
    return by_group.reshape(-1, *[1] * (like.ndim - 1))
