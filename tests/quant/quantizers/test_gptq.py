"""GPTQ against a naive one that follows the paper's equations, and against plain rounding."""

import pytest
import torch

from quant.inputs import LayerInputs
from quant.packing import decode
from quant.quantizers import adaquant, gptq, mse_clip
from quant.quantizers.gptq import DAMPING, inverse_factor, round_with_feedback
from quant.quantizers.grid import Grid
from quant.schemes import parse_scheme


def layer_inputs(columns, rows=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.linspace(0.2, 2, columns)
    samples = torch.randn(rows, columns, generator=generator) @ mixing
    return LayerInputs((samples.T @ samples / rows)[None], rows)


def matrix_of(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def optimal_brain_quantization(matrix, order, grid, moments):
    """Equation 2 and 3: after each column the inverse Hessian of the rest is formed anew."""
    left, done = matrix.double().clone(), torch.empty_like(matrix)
    damped = moments.double() / moments.diagonal().double().mean() + DAMPING * torch.eye(len(moments))
    for at, column in enumerate(order.tolist()):
        rest = order[at:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        value = left[:, column : column + 1].float()
        done[:, column : column + 1] = grid.rounded(value, torch.tensor([column]))
        error = (left[:, column] - done[:, column]) / inverse[0, 0]
        left[:, rest] -= torch.outer(error, inverse[0])
    return done


@pytest.mark.parametrize("scheme", ["w4", "w3-g16-asym"])
def test_blocks_give_what_the_papers_equations_give(scheme, monkeypatch):
    monkeypatch.setattr(gptq, "BLOCK", 8)
    matrix, known = matrix_of(5, 44), layer_inputs(44)
    moments = known.second_moments[0]
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    grid = Grid.of(mse_clip.quantize(matrix, parse_scheme(scheme).weight))
    found = torch.empty_like(matrix)
    found[:, order] = round_with_feedback(
        matrix[:, order], order, grid, inverse_factor(moments[order][:, order])
    )
    assert torch.allclose(found, optimal_brain_quantization(matrix, order, grid, moments), atol=1e-5)


@pytest.mark.parametrize("scheme", ["w2", "w3", "w4", "w4-g32-asym", "w8-tensor"])
def test_it_takes_much_off_the_output_error_of_correlated_inputs(scheme):
    fmt, matrix, known = parse_scheme(scheme).weight, matrix_of(32, 96), layer_inputs(96)
    errors = [
        known.output_errors(decode(quantized) - matrix).sum()
        for quantized in (gptq.quantize(matrix, fmt, known), mse_clip.quantize(matrix, fmt))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_independent_inputs_leave_nothing_to_make_up_for():
    matrix, fmt = matrix_of(6, 20), parse_scheme("w4").weight
    known = LayerInputs(torch.eye(20)[None], 10)
    errors = (decode(gptq.quantize(matrix, fmt, known)) - matrix).square().sum(1)
    plain = (decode(mse_clip.quantize(matrix, fmt)) - matrix).square().sum(1)
    assert torch.allclose(errors, plain, rtol=1e-3)


def test_inputs_that_never_came_are_rounded():
    matrix, fmt = matrix_of(6, 20), parse_scheme("w3").weight
    known = LayerInputs(torch.zeros(1, 20, 20), 0)
    assert torch.equal(decode(gptq.quantize(matrix, fmt, known)), decode(mse_clip.quantize(matrix, fmt)))


def test_moments_of_low_rank_are_damped():
    column = torch.linspace(-1, 1, 24)[:, None]
    known = LayerInputs((column @ column.T)[None] * 1e6, 1)
    matrix, fmt = matrix_of(6, 24), parse_scheme("w4").weight
    ours, theirs = (
        known.output_errors(decode(q) - matrix).sum()
        for q in (gptq.quantize(matrix, fmt, known), mse_clip.quantize(matrix, fmt))
    )
    assert ours < 0.1 * theirs


def test_moments_that_are_not_finite_fall_back_to_rounding():
    matrix, fmt = matrix_of(6, 20), parse_scheme("w3").weight
    known = LayerInputs(torch.full((1, 20, 20), torch.inf), 4)
    assert torch.isfinite(decode(gptq.quantize(matrix, fmt, known))).all()


@pytest.mark.parametrize("quantizer", [gptq, adaquant], ids=["gptq", "adaquant"])
def test_the_moments_of_a_group_are_factored_once_for_all_scales(quantizer, monkeypatch):
    calls = []
    monkeypatch.setattr(gptq, "inverse_factor", lambda moments: calls.append(1) or inverse_factor(moments))
    known = LayerInputs(torch.stack([layer_inputs(6, seed=n).second_moments[0] for n in range(32)]), 512)
    quantizer.quantize(matrix_of(64, 6), parse_scheme("w3").weight, known)
    assert len(calls) == 32
