"""Which of several scales leaves a group the least squared error; every block of weights is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.codecs.elements import snap
from quant.codecs.stored import BLOCK
from quant.elements import Element

SHORT = 512
"""Groups shorter than this lie side by side, so that neighboring weights share no scale."""
MARGIN = 1e-5
"""A scale replaces round-to-nearest's only where it is better by more than the sums' rounding error."""


class Groups:
    """Weights of (count, size) groups, each divided by a power of two: squares stay in range."""

    def __init__(self, groups: Tensor, element: Element) -> None:
        self.element = element
        self.axis = 0 if groups.shape[1] < SHORT else 1
        weights = groups.t().contiguous() if self.axis == 0 else groups
        top = weights.abs().amax(dim=self.axis, keepdim=True)
        self.unit = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent.clamp(-125, 126))
        self.parts = (
            tuple(part / self.unit for part in torch.split(weights, BLOCK, dim=1))
            if self.axis
            else (weights / self.unit,)
        )

    def errors(self, scales: Tensor) -> Tensor:
        """Squared error of every candidate: (candidates, count) scales -> the same shape."""
        found = torch.zeros_like(scales)
        for part in self.parts:
            for index, scale in enumerate(scales):
                steps = self._relative(scale)
                miss = snap(part / steps, self.element).mul_(steps).sub_(part)
                found[index] += miss.square_().sum(dim=self.axis)
        return found

    def fitted(self, scales: Tensor) -> Tensor:
        """The least-squares scales for the codes that (count,) scales round to."""
        dot, square = torch.zeros_like(scales), torch.zeros_like(scales)
        steps = self._relative(scales)
        for part in self.parts:
            levels = snap(part / steps, self.element)
            square += levels.square().sum(dim=self.axis)
            dot += levels.mul_(part).sum(dim=self.axis)
        better = dot / square.clamp(min=torch.finfo(torch.float32).tiny) * self.unit.reshape(-1)
        return torch.where((square > 0) & (dot > 0), better, scales)

    def _relative(self, scale: Tensor) -> Tensor:
        return (scale / self.unit.reshape(-1)).unsqueeze(self.axis)


def best(errors: Tensor) -> Tensor:
    """Index of the least of (candidates, count) errors; the first, unless another is clearly better."""
    least, index = errors.min(dim=0)
    return torch.where(least < errors[0] * (1 - MARGIN), index, 0)


def pick(candidates: Tensor, index: Tensor) -> Tensor:
    """candidates[index[i], i] for every group i."""
    return candidates.gather(0, index.unsqueeze(0)).squeeze(0)
