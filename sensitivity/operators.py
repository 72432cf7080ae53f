"""Matrices that are known by what they do to a vector."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockHessian:
    """The block of a loss's Hessian that belongs to one parameter, all other parameters held fixed.

    Products multiply rows of vectors (m, P) with P = parameter.numel(); the graph of `loss` is built
    once and serves all of them. `vectorized` computes the rows of one call together (more memory, and
    the last bits may depend on m). A parameter that the loss does not depend on has a zero block.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> BlockHessian((w**3).sum(), w)(torch.eye(2)).tolist()
    [[6.0, 0.0], [0.0, 12.0]]
    """

    def __init__(self, loss: Tensor, parameter: Tensor, *, vectorized: bool = False) -> None:
        if loss.numel() != 1:
            raise ValueError(f"loss must be a scalar. Got shape {tuple(loss.shape)}.")
        self._parameter, self._vectorized = parameter, vectorized
        self._gradient: Tensor | None = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True, allow_unused=True)
            self._gradient = gradient if gradient is not None and gradient.requires_grad else None

    def __call__(self, vectors: Tensor) -> Tensor:
        """H v for each row v of `vectors` (m, P)."""
        if vectors.ndim != 2 or vectors.shape[1] != self._parameter.numel():
            raise ValueError(f"vectors must be (m, {self._parameter.numel()}). Got {tuple(vectors.shape)}.")
        shaped = vectors.view(-1, *self._parameter.shape).to(self._parameter)
        if self._vectorized:
            return self._product(shaped, batched=True).reshape(vectors.shape).to(vectors)
        products = [self._product(vector, batched=False).reshape(-1) for vector in shaped]
        return torch.stack(products).to(vectors)

    def _product(self, direction: Tensor, *, batched: bool) -> Tensor:
        if self._gradient is None:
            return torch.zeros_like(direction)
        (product,) = torch.autograd.grad(
            self._gradient,
            self._parameter,
            direction,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return torch.zeros_like(direction) if product is None else product
