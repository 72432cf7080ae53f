"""What a quantizer may know about the inputs of its layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.quantizers.runs import runs


class InputsError(ValueError):
    """Statistics that are missing, or are not those of the layer."""


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Second moments of a layer's inputs over the scoring part, at full precision.

    `second_moments` is (groups, columns, columns), float32: X'X / samples of the columns that each group of
    output channels multiplies; one group except for grouped convolutions and fused experts, whose channels
    are split evenly.
    `samples` counts the rows of X: tokens, or positions of a convolution. An input that the calibration data
    never reached has zeros. `largest` (columns,) are the largest magnitudes, for quantizers that go by them.
    """

    second_moments: Tensor
    samples: int
    largest: Tensor | None = None

    @property
    def groups(self) -> int:
        """How many groups of output channels have inputs of their own."""
        return int(self.second_moments.shape[0])

    def of(self, groups: slice) -> LayerInputs:
        """The statistics of some groups of output channels."""
        return replace(self, second_moments=self.second_moments[groups])

    def require(self, matrix: tuple[int, int]) -> None:
        """Raise InputsError unless these are statistics for a matrix of (output channels, columns)."""
        rows, columns = matrix
        if tuple(self.second_moments.shape[1:]) != (columns, columns) or rows % self.groups:
            raise InputsError(
                f"Second moments must be (groups, {columns}, {columns}) for a matrix {rows} x {columns}."
                f" Got {tuple(self.second_moments.shape)}. Collect them at this layer's input."
            )

    def output_errors(self, errors: Tensor) -> Tensor:
        """dW (rows, columns) -> diagonal of dW H dW' (rows,): mean squared output error per channel.

        >>> inputs = LayerInputs(torch.eye(2)[None] * 4, samples=1)
        >>> inputs.output_errors(torch.tensor([[1.0, 2.0]])).tolist()
        [20.0]
        """
        rows, columns = errors.shape
        found = torch.empty(rows, device=errors.device)
        for part, groups in runs(rows, columns, self.groups):
            moments = self.second_moments[groups]
            own = errors[part].float().reshape(len(moments), -1, columns)
            found[part] = torch.einsum("grc,gcd,grd->gr", own, moments, own).clamp(min=0).reshape(-1)
        return found


def required(inputs: LayerInputs | None, matrix: tuple[int, int], quantizer: str) -> LayerInputs:
    """The statistics, checked. Raises InputsError where they are missing or another layer's."""
    if inputs is None:
        raise InputsError(
            f"Quantizer {quantizer} must be given statistics of the layer's inputs. Got none."
            " Pass calibration data, or use mse_clip."
        )
    inputs.require(matrix)
    return inputs
