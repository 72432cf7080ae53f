"""What a quantizer stores beside its format, and the weights that both together stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from quant.formats import codec_of
from quant.inputs import LayerInputs
from quant.packing import Encoded

SMALLEST, HIGHEST = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max


class Addition(Protocol):
    """Tensors of their own, in float16."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored; their bits are those that the quantizer's line of QUANTIZERS counts."""

    def restore(self, decoded: Tensor) -> Tensor:
        """The weights (rows, columns), float32, from what the format decodes to, whose memory may be used."""


@dataclass(frozen=True)
class Adjusted:
    """A matrix as its format stores it, and what turns the decoded values into the weights."""

    stored: Encoded
    addition: Addition


@dataclass(frozen=True)
class LowRank:
    """weights = decoded + left @ right, with `left` (rows, rank) and `right` (rank, columns)."""

    left: Tensor
    right: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.left, self.right

    def restore(self, decoded: Tensor) -> Tensor:
        """Add the product of the factors."""
        return decoded.addmm_(self.left.float(), self.right.float())


@dataclass(frozen=True)
class ColumnScales:
    """weights = decoded / scales, with `scales` (columns,).

    A runtime may fold 1 / scales into what comes before the layer (a norm, another layer) and multiply with
    the decoded values as they are.
    """

    scales: Tensor

    @classmethod
    def of(cls, wanted: Tensor) -> ColumnScales:
        """From positive float32 scales, as near as float16 holds them with full precision."""
        return cls(wanted.clamp(SMALLEST, HIGHEST).half())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The scales."""
        return (self.scales,)

    def multiplied(self, weights: Tensor) -> Tensor:
        """weights * scales, float32: what the format stores instead."""
        largest = torch.finfo(torch.float32).max
        return (weights.float() * self.scales.float()).clamp_(-largest, largest)

    def restore(self, decoded: Tensor) -> Tensor:
        """Divide by the scales."""
        return decoded.div_(self.scales.float())

    def divided_inputs(self, inputs: LayerInputs) -> LayerInputs:
        """Statistics of inputs / scales, which the multiplied weights are for."""
        scales = self.scales.float()
        largest = None if inputs.largest is None else inputs.largest / scales
        return replace(
            inputs, second_moments=inputs.second_moments / torch.outer(scales, scales), largest=largest
        )


def addition_of(tensors: Mapping[str, Tensor]) -> Addition:
    """The addition with these fields, as `Adjustment.shapes` names them: the inverse of `vars`."""
    return LowRank(**tensors) if "left" in tensors else ColumnScales(**tensors)


def dequantized(quantized: Encoded | Adjusted) -> Tensor:
    """The float32 weights (rows, columns) that a quantizer's result stands for."""
    if isinstance(quantized, Adjusted):
        return quantized.addition.restore(dequantized(quantized.stored))
    return cast(Tensor, codec_of(quantized.fmt).decode(quantized))
