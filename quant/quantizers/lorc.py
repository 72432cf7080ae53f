"""LoRC (Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302, section 4): what rounding leaves behind, stored as a
product of two thin matrices in float16.

The factors are the best of their rank for the squared error of the weights or, where the quantizer that
rounds goes by the layer's inputs, of its outputs. Rounding what the factors leave and fitting them again, in
turn, is from LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.adjusted import HIGHEST, Addition, Adjusted, LowRank, dequantized
from quant.catalog import Quantize
from quant.inputs import LayerInputs
from quant.integer import IntegerFormat
from quant.packing import Encoded

ROUNDS = 4
"""Times that the matrix is rounded and factors are fitted to what is left."""
ITERATIONS = 8
OVERSAMPLING = 8


def quantize(
    weight_matrix: Tensor,
    fmt: IntegerFormat,
    inputs: LayerInputs | None = None,
    *,
    base: Quantize,
    parameter: int,
) -> Adjusted:
    """Round (output channels, columns) of finite floats with `base` and add factors of rank `parameter`.

    Never worse than `base` alone in the error of the whole matrix. Channels that the factors do not help have
    zeros in the left one. Temporary memory is that of a float32 copy of the matrix, or of one beside what
    `base` needs.
    """
    weights = weight_matrix.float()
    best, least = _fitted(weights, base(weight_matrix, fmt, inputs), parameter, inputs)
    for _ in range(ROUNDS - 1):
        stored = base(_less(weights, best.addition), fmt, inputs)
        found, total = _fitted(weights, stored, parameter, inputs)
        if not bool(total < least):
            break
        best, least = found, total
    return best


def _less(weights: Tensor, addition: Addition) -> Tensor:
    """What the base is to round, given what is added to it."""
    return addition.restore(-weights).neg_()


def _fitted(
    weights: Tensor, stored: Encoded, rank: int, inputs: LayerInputs | None
) -> tuple[Adjusted, Tensor]:
    """Factors for what is left of the weights, and the error that remains with them.

    Channels whose error no float16 can hold are left alone, as are those that the factors do not help.
    """
    error = dequantized(stored).neg_().add_(weights)
    before = _errors(error, inputs)
    low, high = error.aminmax(dim=1)
    helped = torch.maximum(-low, high) <= HIGHEST
    error[~helped] = 0
    moments = None if inputs is None else inputs.second_moments.mean(dim=0)
    vectors = left_vectors(error, rank, moments)
    factors = _balanced(vectors, vectors.T @ error)
    after = _errors(error.addmm_(factors.left.float(), factors.right.float(), alpha=-1), inputs)
    helped &= after < before
    factors.left[~helped] = 0
    return Adjusted(stored, factors), torch.where(helped, after, before).sum()


def _errors(error: Tensor, inputs: LayerInputs | None) -> Tensor:
    """(rows,) in float64: squared error of each channel's weights, or of its output."""
    if inputs is not None:
        return inputs.output_errors(error).double()
    norms: Tensor = torch.linalg.vector_norm(error, dim=1)
    return norms.double().square()


def _balanced(left: Tensor, right: Tensor) -> LowRank:
    """Both factors in float16, each pair of vectors with the same largest entry."""
    largest = right.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    ratio = (largest / left.abs().amax(dim=0)).sqrt()
    return LowRank((left * ratio).clamp(-HIGHEST, HIGHEST).half(), (right / ratio[:, None]).half())


def left_vectors(matrix: Tensor, rank: int, moments: Tensor | None = None) -> Tensor:
    """The first `rank` left singular vectors U (rows, rank) of matrix @ sqrt(moments).

    U @ (U' @ matrix) is the best approximation of that rank, in the norm of `moments` (columns, columns).
    Subspace iteration from a fixed start (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4): equal matrices
    give equal vectors, and the largest entry of each is positive.
    """
    rows, columns = matrix.shape
    width = min(rank + OVERSAMPLING, rows, columns)
    start = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    basis = start.to(matrix.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ _image(matrix, basis, moments)).Q
    small = basis.T @ (matrix @ _image(matrix, basis, moments))
    turned = torch.linalg.eigh(small.double()).eigenvectors.flip(1)[:, :rank]
    vectors: Tensor = basis @ turned.float()
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _image(matrix: Tensor, basis: Tensor, moments: Tensor | None) -> Tensor:
    image = matrix.T @ basis
    return image if moments is None else moments @ image
