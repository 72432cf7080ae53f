import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats import FORMATS, IntegerFormat
from quant.packing import decode, group
from quant.quantizers import mse_clip, rtn

KINDS = ("normal", "heavy", "shifted", "outlier", "sparse")


def weights(kind, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "heavy":
        return normal**3
    if kind == "shifted":
        return normal + 3
    if kind == "outlier":
        normal[:, 0] *= 100
    if kind == "sparse":
        normal[normal.abs() < 1] = 0
    return normal


def errors(quantize, matrix, fmt):
    """Squared error of every group, (1,) per tensor, in float64."""
    miss = (decode(quantize(matrix, fmt)).double() - matrix.double()).square()
    return miss.sum().reshape(1) if fmt.granularity == "tensor" else group(miss, fmt).sum(dim=-1)


def brute_force(matrix, bits, symmetric):
    """The least error of each channel over 600 scales and every zero point."""
    low = -(1 << bits - 1) if symmetric else 0
    high = low + (1 << bits) - 1
    reach = matrix.abs().amax(dim=1, keepdim=True) / high if symmetric else None
    if reach is None:
        span = matrix.amax(dim=1, keepdim=True).clamp(min=0) - matrix.amin(dim=1, keepdim=True).clamp(max=0)
        reach = span / high
    best = torch.full((len(matrix),), torch.inf)
    for point in [0] if symmetric else range(high + 1):
        for step in range(1, 601):
            scale = (reach * step / 500).half().float()
            miss = ((matrix / scale).round() + point).clamp(low, high).sub(point).mul(scale).sub(matrix)
            best = torch.minimum(best, miss.square().sum(dim=1))
    return best


@pytest.mark.parametrize("fmt", FORMATS["integer"].examples[::4], ids=lambda fmt: fmt.name)
def test_no_group_is_worse_than_round_to_nearest(fmt):
    for kind in KINDS:
        matrix = weights(kind, (9, 67))
        assert (errors(mse_clip.quantize, matrix, fmt) <= errors(rtn.quantize, matrix, fmt)).all(), kind


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(KINDS),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([1e-38, 1e-7, 1.0, 1e5, 1e30]),
    st.integers(0, 999),
)
def test_no_channel_is_worse_at_any_magnitude(kind, bits, symmetric, unit, seed):
    matrix = weights(kind, (5, 40), seed) * unit
    fmt = IntegerFormat(bits, symmetric)
    assert (errors(mse_clip.quantize, matrix, fmt) <= errors(rtn.quantize, matrix, fmt)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "outlier"])
def test_within_two_percent_of_brute_force_on_average(kind, bits, symmetric):
    matrix = weights(kind, (40, 100))
    fmt = IntegerFormat(bits, symmetric)
    ratio = errors(mse_clip.quantize, matrix, fmt).reshape(-1) / brute_force(matrix, bits, symmetric)
    assert ratio.mean() < 1.02
    assert ratio.max() < 1.35


def test_two_bits_of_a_normal_distribution_are_clipped_hard():
    matrix = weights("normal", (4, 4096))
    fmt = IntegerFormat(2)
    ratio = errors(mse_clip.quantize, matrix, fmt) / errors(rtn.quantize, matrix, fmt)
    assert (ratio < 0.3).all()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_do_not_change_the_result(monkeypatch, granularity, symmetric):
    matrix, fmt = weights("heavy", (6, 700)), IntegerFormat(3, symmetric, granularity)
    whole = decode(mse_clip.quantize(matrix, fmt))
    monkeypatch.setattr(mse_clip, "BLOCK", 701)
    assert (decode(mse_clip.quantize(matrix, fmt)) - whole).abs().max() <= 1e-3 * whole.abs().max()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_skipping_hopeless_factors_changes_nothing(monkeypatch, bits, symmetric):
    matrix, fmt = weights("heavy", (50, 64)), IntegerFormat(bits, symmetric)
    quick = decode(mse_clip.quantize(matrix, fmt))
    monkeypatch.setattr(mse_clip.Scan, "smallest_factor", lambda scan, full: 0.0)
    assert torch.equal(quick, decode(mse_clip.quantize(matrix, fmt)))
