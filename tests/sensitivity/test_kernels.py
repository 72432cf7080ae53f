from __future__ import annotations

import pytest
import torch

from quant.latency import Case
from sensitivity.errors import BadUnit, SessionError
from sensitivity.kernels import KERNELS, KernelSession, time_case
from sensitivity.spec import NO_DATA, ModelSource, SessionSpec
from sensitivity.units import InspectUnit, TimingUnit, unit_from_json

CASES = (
    Case("dense", 32, 64, 2, "float32", copies=2),
    Case("int8_weight_only", 32, 64, 2, "float32"),
    Case("int8_dynamic", 32, 64, 2, "float32"),
    Case("int4_weight_only", 32, 64, 2, "bfloat16", 32),
    Case("embedding", 32, 64, 2, "float32"),
)


def spec(device="cpu"):
    return SessionSpec(ModelSource("folder", "m", ""), NO_DATA, device=device)


@pytest.mark.parametrize(
    ("kernel", "dtype", "error"),
    [
        ("dense", torch.float32, 1e-6),
        ("int8_weight_only", torch.float32, 0.02),
        ("int8_weight_only", torch.bfloat16, 0.02),
        ("int8_dynamic", torch.float32, 0.03),
        ("int4_weight_only", torch.float32, 0.15),
        ("int4_weight_only", torch.bfloat16, 0.15),
    ],
)
def test_a_kernel_computes_the_layer_within_its_precision(kernel, dtype, error):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 128, generator=generator).to(dtype)
    inputs = torch.randn(5, 128, generator=generator).to(dtype)
    expected = inputs.double() @ weight.double().T
    found = KERNELS[kernel](weight, 32)(inputs).double()
    assert float((found - expected).norm() / expected.norm()) < error


def test_int4_scales_follow_their_groups():
    weight = torch.ones(16, 64)
    weight[:, ::2] = 0
    weight[:, 32:] *= 1000
    found = KERNELS["int4_weight_only"](weight, 32)(torch.eye(64))
    assert torch.allclose(found.T, weight, atol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_a_timing_has_a_median_and_a_spread(case):
    timing = time_case(case)
    assert timing.median_ns > 0
    assert timing.spread_ns >= 0
    assert timing.repeats >= 15


def test_a_session_times_what_is_not_known_for_its_device():
    session = KernelSession(spec())
    unit = TimingUnit(tuple(case.as_json() for case in CASES[:2]))
    facts = session.run(unit_from_json(unit.as_json())).facts
    assert set(facts["timings"]) == {case.key for case in CASES[:2]}
    known = {facts["fingerprint"]: (CASES[0].key,), "another": (CASES[1].key,)}
    again = session.run(TimingUnit(unit.cases, known)).facts
    assert set(again["timings"]) == {CASES[1].key}
    assert again["fingerprint"] == facts["fingerprint"]


def test_a_kernel_session_refuses_other_devices_and_units():
    with pytest.raises(SessionError, match=r"device must be cpu.*Got 'cuda'"):
        KernelSession(spec("cuda"))
    with pytest.raises(BadUnit, match="asked for timings"):
        KernelSession(spec()).run(InspectUnit())
