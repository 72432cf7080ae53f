"""HQQ against least squares where its objective is that, and against the quantizers it starts from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.integer import IntegerFormat
from quant.packing import decode, group
from quant.quantizers import hqq, mse_clip, rtn
from quant.quantizers.hqq import POWER, _outliers, _step
from quant.quantizers.mse_clip import Scan
from quant.schemes import parse_scheme


def weights(rows, columns, seed=0, heavy=1.5):
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return normal.sign() * normal.abs() ** heavy


def objective(quantizer, matrix, fmt, unit=1.0):
    miss = ((decode(quantizer.quantize(matrix, fmt)).double() - matrix.double()) / unit).abs() ** POWER
    return miss.sum().reshape(1) if fmt.granularity == "tensor" else group(miss, fmt).sum(-1)


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
def test_without_outliers_a_step_is_the_least_squares_fit(symmetric):
    """A penalty so small that no error is an outlier: numpy's least squares on the same integers."""
    matrix, fmt = weights(4, 600), IntegerFormat(3, symmetric)
    scan = Scan.of(matrix, fmt)
    start = scan.measure([(scan.low * 0.7, scan.high * 0.7)])[0]
    scale, point = _step(scan, start.scale.float() / scan.unit, start.point, 1e-9)
    for row in range(4):
        zero = 0 if symmetric else start.point[row].item()
        levels = (matrix[row] / start.scale[row].float()).round().add(zero).clamp(fmt.lowest, fmt.highest)
        columns = [levels] if symmetric else [levels, torch.ones_like(levels)]
        fitted = np.linalg.lstsq(torch.stack(columns, 1).numpy(), matrix[row].numpy(), rcond=None)[0]
        assert scale[row] * scan.unit[row] == pytest.approx(fitted[0], rel=1e-4)
        if not symmetric:
            assert point[row] == pytest.approx(-fitted[1] / fitted[0], abs=1e-3)


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
