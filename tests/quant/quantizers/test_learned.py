"""AdaRound and AdaQuant: gradients against autograd, results against every rounding, memory, odd layers."""

import itertools

import pytest
import torch

from quant.inputs import LayerInputs
from quant.packing import decode
from quant.quantizers import adaquant, adaround, gptq, mse_clip, runs
from quant.quantizers.grid import Grid
from quant.quantizers.learning import Piece
from quant.schemes import parse_scheme

QUANTIZERS = [adaround, adaquant]
both = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=["adaround", "adaquant"])


def layer_inputs(columns, rows=512, seed=0, groups=1):
    generator = torch.Generator().manual_seed(seed)
    moments = []
    for _ in range(groups):
        mixing = torch.randn(columns, columns, generator=generator) * torch.linspace(0.2, 2, columns)
        samples = torch.randn(rows, columns, generator=generator) @ mixing
        moments.append(samples.T @ samples / rows)
    return LayerInputs(torch.stack(moments), rows)


def matrix_of(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(quantized, matrix, known):
    return known.output_errors(decode(quantized) - matrix).sum().item()


@both
@pytest.mark.parametrize("scheme", ["w2", "w3", "w4", "w4-g32-asym", "w8-tensor", "w3-g20-asym"])
def test_it_takes_much_off_the_output_error_of_correlated_inputs(quantizer, scheme):
    fmt, matrix, known = parse_scheme(scheme).weight, matrix_of(32, 96), layer_inputs(96)
    ours = output_error(quantizer.quantize(matrix, fmt, known), matrix, known)
    assert ours < 0.7 * output_error(mse_clip.quantize(matrix, fmt), matrix, known)


@pytest.mark.parametrize("scheme", ["w2", "w3-g16-asym", "w4-tensor"])
def test_adaquant_is_never_worse_than_gptq(scheme):
    fmt, matrix, known = parse_scheme(scheme).weight, matrix_of(24, 48), layer_inputs(48)
    ours, theirs = (
        known.output_errors(decode(quantizer.quantize(matrix, fmt, known)) - matrix)
        for quantizer in (adaquant, gptq)
    )
    if scheme.endswith("tensor"):
        ours, theirs = ours.sum(), theirs.sum()
    assert (ours <= theirs * (1 + 1e-4)).all()
    assert ours.sum() < theirs.sum()


def test_adaround_comes_near_the_best_of_all_roundings():
    """Every choice of up and down on mse_clip's grid, 2^10 of them per channel."""
    matrix, fmt, known = matrix_of(12, 10), parse_scheme("w3-float32").weight, layer_inputs(10)
    grid = Grid.of(mse_clip.quantize(matrix, fmt))
    below = (matrix / grid.scales).floor()
    choices = torch.tensor(list(itertools.product([0.0, 1.0], repeat=10)))
    levels = (below[:, None] + choices).clamp(fmt.lowest, fmt.highest)
    errors = levels * grid.scales[:, None] - matrix[:, None]
    best = torch.einsum("rnc,cd,rnd->rn", errors, known.second_moments[0], errors).amin(1)
    nearest = known.output_errors(decode(mse_clip.quantize(matrix, fmt)) - matrix)
    found = known.output_errors(decode(adaround.quantize(matrix, fmt, known)) - matrix)
    assert found.sum() < best.sum() + 0.25 * (nearest.sum() - best.sum())
    assert (found >= best * (1 - 1e-4)).all()


def test_gradients_are_those_of_autograd():
    """The rectified sigmoid's and the regularizer's slopes, written out by hand in adaround."""
    logits = torch.linspace(-4, 4, 41).requires_grad_(True)
    soft = (logits.sigmoid() * adaround.STRETCH - adaround.MARGIN).clamp(0, 1)
    soft.sum().backward()
    with torch.no_grad():
        assert torch.allclose(adaround._rectified_slope(logits, adaround._rectified(logits)), logits.grad)
    level = torch.linspace(0.01, 0.99, 21).requires_grad_(True)
    step = adaround.STEPS - 1
    slope = adaround._regularizer_slope(level.detach(), step)
    flat = adaround.FLATTEST
    (adaround.PRICE * (1 - (2 * level - 1).abs() ** flat)).sum().backward()
    assert torch.allclose(slope, level.grad, rtol=0.05, atol=0.1)
    assert adaround._regularizer_slope(level.detach(), 0) == 0


def test_the_start_of_the_logits_is_the_weight_itself():
    fraction = torch.linspace(0, 1, 11)
    assert torch.allclose(adaround._rectified(adaround._logits(fraction)), fraction, atol=1e-6)


@both
def test_inputs_that_never_came_are_rounded(quantizer):
    matrix, fmt = matrix_of(6, 20), parse_scheme("w3").weight
    nothing = LayerInputs(torch.zeros(1, 20, 20), 0)
    assert torch.equal(
        decode(quantizer.quantize(matrix, fmt, nothing)), decode(mse_clip.quantize(matrix, fmt))
    )


def test_adaround_rounds_the_columns_without_input():
    matrix, fmt, known = matrix_of(6, 20), parse_scheme("w4").weight, layer_inputs(20)
    known.second_moments[:, 7] = known.second_moments[:, :, 7] = 0
    found, plain = adaround.quantize(matrix, fmt, known), mse_clip.quantize(matrix, fmt)
    own = (found.scales == plain.scales).reshape(-1)
    assert own.any()
    assert torch.equal(found.values.reshape(6, 20)[own, 7], plain.values.reshape(6, 20)[own, 7])


@both
def test_moments_that_are_not_finite_fall_back_to_rounding(quantizer):
    matrix, fmt = matrix_of(6, 20), parse_scheme("w3").weight
    known = LayerInputs(torch.full((1, 20, 20), torch.inf), 4)
    assert torch.isfinite(decode(quantizer.quantize(matrix, fmt, known))).all()


@both
@pytest.mark.parametrize("scheme", ["w3", "w2-g5-asym", "w4-tensor"])
def test_grouped_convolutions_of_one_channel_each(quantizer, scheme):
    matrix, fmt, known = matrix_of(40, 9), parse_scheme(scheme).weight, layer_inputs(9, groups=40)
    ours = output_error(quantizer.quantize(matrix, fmt, known), matrix, known)
    assert ours < output_error(mse_clip.quantize(matrix, fmt), matrix, known)


@pytest.mark.parametrize("scheme", ["w3", "w3-tensor-asym"])
@pytest.mark.parametrize("groups", [1, 4, 24])
@pytest.mark.parametrize("quantizer", [gptq, *QUANTIZERS], ids=["gptq", "adaround", "adaquant"])
def test_pieces_do_not_change_the_result(monkeypatch, groups, quantizer, scheme):
    matrix, known = matrix_of(24, 12), layer_inputs(12, groups=groups)
    fmt = parse_scheme(scheme).weight
    whole = quantizer.quantize(matrix, fmt, known)
    monkeypatch.setattr(runs, "FEW", 12 * 5)
    monkeypatch.setattr(gptq, "FEW", 12 * 5)
    pieces = quantizer.quantize(matrix, fmt, known)
    assert pieces.values.shape == whole.values.shape
    assert pieces.scales.shape == whole.scales.shape
    if quantizer is gptq:
        assert torch.equal(pieces.scales, whole.scales)
        assert pieces.zero_points is whole.zero_points is None or torch.equal(
            pieces.zero_points, whole.zero_points
        )
        ours, theirs = (known.output_errors(decode(found) - matrix) for found in (pieces, whole))
        assert torch.allclose(ours, theirs, rtol=1e-4)
    else:  # Adam's steps follow rounding errors of sums
        ours, theirs = (output_error(found, matrix, known) for found in (pieces, whole))
        assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(7, 300_000, 1), (64, 9, 64), (64, 9, 4), (100, 5000, 2)]
)
def test_runs_cover_every_row_once_and_keep_to_their_group(rows, columns, groups):
    height, seen = rows // groups, []
    for part, chosen in runs.runs(rows, columns, groups):
        own = range(part.start, part.stop)
        assert len(own) % (chosen.stop - chosen.start) == 0
        assert {row // height for row in own} == set(range(chosen.start, chosen.stop))
        seen += own
    assert seen == list(range(rows))


def test_a_piece_knows_the_error_of_its_start():
    matrix, known = matrix_of(4, 8), layer_inputs(8)
    start = mse_clip.quantize(matrix, parse_scheme("w2").weight)
    piece = Piece.of(matrix, start.values.reshape(4, 8).float(), Grid.of(start), known.second_moments)
    expected = known.output_errors(decode(start) - matrix)
    assert torch.allclose(piece.start_errors()[:, 0] * 8 * piece.unit[:, 0] ** 2, expected, rtol=1e-4)
