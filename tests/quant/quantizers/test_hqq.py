"""HQQ against a search over every zero point and many scales, and against the quantizers it starts from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.integer import IntegerFormat
from quant.packing import decode, group
from quant.quantizers import hqq, mse_clip, rtn
from quant.quantizers.hqq import POWER, _outliers
from quant.schemes import parse_scheme


def weights(rows, columns, seed=0, heavy=1.5):
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return normal.sign() * normal.abs() ** heavy


def objective(quantizer, matrix, fmt, unit=1.0):
    miss = ((decode(quantizer.quantize(matrix, fmt)).double() - matrix.double()) / unit).abs() ** POWER
    return miss.sum().reshape(1) if fmt.granularity == "tensor" else group(miss, fmt).sum(-1)


def brute_force(matrix, bits, symmetric):
    low = -(1 << bits - 1) if symmetric else 0
    high = low + (1 << bits) - 1
    reach = matrix.abs().amax(dim=1, keepdim=True) / (high if symmetric else high / 2)
    best = torch.full((len(matrix),), torch.inf)
    for point in [0] if symmetric else range(high + 1):
        for step in range(1, 401):
            scale = (reach * step / 380).half().float()
            levels = ((matrix / scale).round() + point).clamp(low, high) - point
            best = torch.minimum(best, (levels * scale - matrix).abs().pow(POWER).sum(1))
    return best


@pytest.mark.parametrize("scheme", ["w2", "w3-tensor", "w3-g16-asym", "w4", "w4-asym-bfloat16", "w8-g8"])
@pytest.mark.parametrize("start", [rtn, mse_clip], ids=["rtn", "mse_clip"])
def test_no_group_is_worse_than_where_it_starts(scheme, start):
    matrix, fmt = weights(16, 96), parse_scheme(scheme).weight
    assert (objective(hqq, matrix, fmt) <= objective(start, matrix, fmt) * (1 + 1e-4)).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.booleans(), st.sampled_from([1e-37, 1e-7, 1.0, 1e5, 1e30]), st.integers(0, 999))
def test_no_channel_is_worse_at_any_magnitude(bits, symmetric, unit, seed):
    matrix, fmt = weights(5, 40, seed) * unit, IntegerFormat(bits, symmetric)
    ours, theirs = (objective(quantizer, matrix, fmt, unit) for quantizer in (hqq, rtn))
    assert (ours <= theirs * (1 + 1e-4)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_near_brute_force_though_the_objective_is_jagged(bits, symmetric):
    matrix, fmt = weights(30, 100), IntegerFormat(bits, symmetric)
    ratio = objective(hqq, matrix, fmt).reshape(-1) / brute_force(matrix, bits, symmetric)
    assert ratio.mean() < 1.12


def test_it_takes_much_off_the_objective_of_the_full_range():
    matrix, fmt = weights(16, 512), parse_scheme("w2").weight
    assert objective(hqq, matrix, fmt).sum() < 0.7 * objective(rtn, matrix, fmt).sum()
    assert objective(hqq, matrix, fmt).sum() < 0.96 * objective(mse_clip, matrix, fmt).sum()


def test_the_threshold_solves_its_problem():
    """argmin |e|^p + penalty / 2 (e - error)^2: the stationary points of large errors, 0 for small ones."""
    errors = torch.tensor([-3.0, -0.01, 0.0, 0.02, 0.8, 5.0])
    found = _outliers(errors.clone(), 4.0)
    assert found[1:4].tolist() == [0, 0, 0]
    candidates = torch.linspace(-6, 6, 120_001)[:, None]
    cost = candidates.abs() ** POWER + 2 * (candidates - errors) ** 2
    assert torch.allclose(candidates[cost.argmin(0), 0], found, atol=0.05)


@pytest.mark.parametrize("scheme", ["w3", "w3-asym-tensor"])
def test_blocks_do_not_change_the_result(monkeypatch, scheme):
    matrix, fmt = weights(6, 700), parse_scheme(scheme).weight
    whole = decode(hqq.quantize(matrix, fmt))
    monkeypatch.setattr(mse_clip, "BLOCK", 701)
    again = decode(hqq.quantize(matrix, fmt))
    assert (again - whole).abs().mean() <= 2e-3 * whole.abs().max()
