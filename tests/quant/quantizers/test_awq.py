import pytest
import torch

from quant.adjusted import HIGHEST, SMALLEST, ColumnScales, dequantized
from quant.inputs import LayerInputs
from quant.quantizers import awq, mse_clip, rtn
from quant.schemes import parse_scheme


def matrix_of(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs_of(sizes, seed=1):
    """Inputs whose columns have about these root mean squares."""
    samples = matrix_of(400, len(sizes), seed) * sizes
    return LayerInputs((samples.T @ samples / 400)[None], 400)


def quantized(name, matrix, known):
    scheme = parse_scheme(name)
    return scheme.load()(matrix, scheme.weight, known)


def output_error(name, matrix, known):
    return known.output_errors(dequantized(quantized(name, matrix, known)) - matrix).sum()


@pytest.mark.parametrize("name", ["w3", "w4-rtn", "w4-g16-asym", "nvfp4", "q4_0", "fp4-g16"])
def test_columns_with_large_inputs_lose_less(name):
    sizes = torch.ones(64)
    sizes[[5, 40]] = 30
    matrix, known = matrix_of(24, 64), inputs_of(sizes)
    assert output_error(f"{name}-awq", matrix, known) < 0.5 * output_error(name, matrix, known)


def test_no_candidate_of_the_grid_is_better():
    matrix, known = matrix_of(16, 40), inputs_of(matrix_of(1, 40, 3)[0].exp())
    fmt = parse_scheme("w3").weight
    ours = output_error("w3-awq", matrix, known)
    for alpha in (0.0, *awq.ALPHAS):
        scales = ColumnScales.of(awq.column_scales(known, alpha))
        decoded = dequantized(mse_clip.quantize(scales.multiplied(matrix), fmt))
        assert ours <= known.output_errors(decoded / scales.scales.float() - matrix).sum() * 1.0001
    assert ours <= known.output_errors(dequantized(rtn.quantize(matrix, fmt)) - matrix).sum()


def test_what_is_stored_is_the_scaled_matrix_and_one_float16_per_column():
    matrix, known = matrix_of(8, 32), inputs_of(torch.linspace(0.1, 9, 32))
    result = quantized("w4-awq", matrix, known)
    [scales] = result.addition.tensors
    assert (scales.shape, scales.dtype) == ((32,), torch.float16)
    assert scales[-1] > scales[0]
    assert torch.equal(dequantized(result.stored) / scales.float(), dequantized(result))


def test_scales_have_a_geometric_mean_of_one_and_follow_the_inputs():
    sizes = torch.tensor([1.0, 2.0, 4.0, 8.0])
    known = LayerInputs(torch.diag(sizes.square())[None], 1)
    scales = awq.column_scales(known, 1.0)
    torch.testing.assert_close(scales, sizes / 8**0.5)
    torch.testing.assert_close(awq.column_scales(known, 0.5), scales.sqrt())
    known = LayerInputs(torch.diag(torch.cat([sizes, torch.zeros(1)]).square())[None], 1)
    torch.testing.assert_close(awq.column_scales(known, 1.0), torch.cat([scales, torch.ones(1)]))


def test_inputs_that_are_alike_or_never_reached_change_nothing():
    matrix = matrix_of(8, 20)
    for moments in (torch.eye(20), torch.zeros(20, 20)):
        result = quantized("w3-awq", matrix, LayerInputs(moments[None], 9))
        assert (result.addition.scales == 1).all()
        assert torch.equal(
            dequantized(result), dequantized(mse_clip.quantize(matrix, parse_scheme("w3").weight))
        )


def test_all_groups_share_their_scales():
    first, second = inputs_of(torch.linspace(1, 30, 18)), inputs_of(torch.linspace(1, 30, 18), seed=5)
    both = LayerInputs(torch.cat([first.second_moments, second.second_moments]), 400)
    matrix = matrix_of(8, 18)
    result = quantized("w3-awq", matrix, both)
    assert result.addition.scales.shape == (18,)
    assert output_error("w3-awq", matrix, both) < output_error("w3", matrix, both)


def test_extreme_scales_and_weights_stay_finite():
    scales = ColumnScales.of(torch.tensor([1e-30, 1.0, 1e30]))
    assert scales.scales.tolist() == [SMALLEST, 1.0, HIGHEST]
    assert torch.isfinite(scales.multiplied(torch.full((2, 3), 3e38))).all()
    known = inputs_of(torch.tensor([1e-20, 1.0, 1e10, 0.0] * 4))
    assert torch.isfinite(dequantized(quantized("w4-awq", matrix_of(4, 16) * 1e30, known))).all()
