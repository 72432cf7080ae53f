import pytest
import torch

from quant.adjusted import dequantized
from quant.inputs import LayerInputs
from quant.quantizers import lorc
from quant.schemes import parse_scheme


def matrix_of(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs_of(columns, seed=1):
    samples = matrix_of(200, columns, seed) @ (torch.eye(columns) + matrix_of(columns, columns, seed + 1) / 4)
    return LayerInputs((samples.T @ samples / 200)[None], 200)


def quantized(name, matrix, known=None):
    scheme = parse_scheme(name)
    return scheme.load()(matrix, scheme.weight, known)


def squared_error(name, matrix):
    return (dequantized(quantized(name, matrix)) - matrix).double().square().sum()


@pytest.mark.parametrize("base", ["w2", "w3-asym", "w4-g16-rtn", "fp8", "nf4-g32", "mxfp4", "nvfp4", "q4_0"])
def test_factors_lower_the_error_and_more_of_them_lower_it_further(base):
    matrix = matrix_of(48, 96)
    errors = [squared_error(name, matrix) for name in (base, f"{base}-lorc1", f"{base}-lorc8")]
    assert errors[2] < errors[1] < errors[0]


def test_one_round_is_the_truncated_singular_value_decomposition(monkeypatch):
    monkeypatch.setattr(lorc, "ROUNDS", 1)
    matrix = matrix_of(40, 60)
    left = matrix - dequantized(quantized("w3", matrix))
    values = torch.linalg.svdvals(left.double())
    best = values[6:].square().sum()
    assert best <= squared_error("w3-lorc6", matrix) <= best * 1.01


def test_rounding_again_what_the_factors_leave_helps(monkeypatch):
    matrix = matrix_of(48, 96)
    error = squared_error("w3-lorc8", matrix)
    monkeypatch.setattr(lorc, "ROUNDS", 1)
    assert error < 0.97 * squared_error("w3-lorc8", matrix)


def test_what_rounding_takes_from_a_matrix_of_rank_one_comes_back():
    matrix = torch.outer(matrix_of(1, 24)[0].abs(), matrix_of(1, 40, 1)[0])
    assert squared_error("w2-lorc1", matrix) < 1e-4 * matrix.square().sum()


def test_with_gptq_the_factors_are_the_best_for_the_outputs(monkeypatch):
    monkeypatch.setattr(lorc, "ROUNDS", 1)
    matrix, known = matrix_of(32, 64), inputs_of(64)
    rounded = dequantized(quantized("w3-gptq", matrix, known))
    ours = dequantized(quantized("w3-gptq-lorc4", matrix, known))
    left, moments = (matrix - rounded).double(), known.second_moments[0].double()
    values = torch.linalg.svdvals(left @ torch.linalg.cholesky(moments + 1e-9 * torch.eye(64)))
    best = values[4:].square().sum()
    assert best * 0.999 <= known.output_errors(ours - matrix).sum() <= best * 1.01


def test_vectors_are_orthonormal_with_a_positive_largest_entry():
    matrix = matrix_of(30, 20)
    vectors = lorc.left_vectors(matrix, 5)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5), atol=1e-4, rtol=0)
    assert (vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)) > 0).all()
    assert torch.equal(lorc.left_vectors(-matrix, 5), vectors)
    exact = torch.linalg.svd(matrix).U[:, :5]
    torch.testing.assert_close((vectors.T @ exact).abs().diagonal(), torch.ones(5), atol=5e-3, rtol=0)


def test_rows_that_no_float16_can_help_are_left_alone():
    matrix = matrix_of(12, 20)
    matrix[3] *= 1e20
    matrix[5] = 0
    factors = quantized("w3-float32-lorc2", matrix).addition
    assert (factors.left[3] == 0).all()
    assert (factors.left[5] == 0).all()
    assert torch.isfinite(factors.right).all()
    assert (factors.left[0] != 0).any()


def test_the_memory_of_a_float32_matrix_is_not_touched():
    matrix = matrix_of(12, 20)
    kept = matrix.clone()
    quantized("w2-lorc2", matrix)
    assert torch.equal(matrix, kept)
