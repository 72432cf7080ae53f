"""Quantizing takes less than twice the matrix's float32 size on top, counted allocation by allocation."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from quant import packing
from quant.adjusted import dequantized
from quant.catalog import QUANTIZERS
from quant.codecs import stored
from quant.formats import codec_of
from quant.inputs import LayerInputs
from quant.quantizers import adaquant, adaround, awq, gptq, hqq, lorc, mse_clip, runs
from quant.schemes import parse_scheme

SHAPE = (256, 3584)
SCHEMES = (
    *("w4", "w4-tensor", "w3-g128-asym", "fp8", "fp8-e5m2-tensor", "fp4", "nf4", "mxfp4", "mxfp8", "nvfp4"),
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "bf16", "fp16"),
)


def peak(work):
    """Most bytes that were allocated at once while `work` ran, with what it returned still held."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = work()
    events = (event for event in found.profiler.kineto_results.events() if event.name() == "[memory]")
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest, result


QUICK = {"mse_clip": ("w4", "w4-tensor", "fp8", "nf4", "mxfp4", "q4_0", "q4_k"), "hqq": ("w4-tensor",)}
"""One scheme for each way to search; the others take their turn with the slow tests."""


def case(name, quantizer):
    quick = name in QUICK.get(quantizer, SCHEMES)
    return pytest.param(name, quantizer, marks=() if quick else pytest.mark.slow)


CASES = [
    case(name, quantizer.name)
    for name in SCHEMES
    for quantizer in QUANTIZERS.values()
    if not quantizer.needs_inputs
    and not quantizer.adjusts
    and parse_scheme(name).weight.family in quantizer.families
]


@pytest.mark.parametrize(("name", "quantizer"), CASES)
def test_quantizing_and_packing_take_less_than_twice_the_size(name, quantizer):
    fmt = parse_scheme(name).weight
    matrix = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    most, encoded = peak(lambda: QUANTIZERS[quantizer].load()(matrix, fmt))
    assert matrix.nbytes / 8 < most < 2 * matrix.nbytes
    most, packed = peak(lambda: codec_of(fmt).pack(encoded))
    assert most < 2 * matrix.nbytes
    assert packed.nbytes == fmt.storage(SHAPE).bytes


TWICE = (
    *("w4-gptq", "w4-tensor-lorc8", "nvfp4-lorc8", "w4-awq", "w4-tensor-awq", "w4-smoothquant-aint8"),
    *("w4-gptq-lorc2", "w4-tensor-gptq-lorc2", "w4-gptq-awq", "w4-gptq-smoothquant-aint8"),
    *("w4-adaround-awq", "w4-adaquant", "w4-adaquant-lorc2", "w4-tensor-hqq-lorc2", "nvfp4-awq"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWICE)
def test_so_does_quantizing_with_more_than_one_pass(monkeypatch, name):
    """Beside the moments. Rows that are taken at once are few here, as they are in a large matrix."""
    monkeypatch.setattr(packing, "BLOCK", 1 << 16)
    monkeypatch.setattr(stored, "BLOCK", 1 << 14)
    monkeypatch.setattr(gptq, "FEW", 1 << 14)
    monkeypatch.setattr(runs, "FEW", 1 << 14)
    monkeypatch.setattr(adaround, "STEPS", 2)
    monkeypatch.setattr(adaquant, "STEPS", 1)
    monkeypatch.setattr(hqq, "STEPS", 2)
    monkeypatch.setattr(awq, "ALPHAS", (0.5,))
    monkeypatch.setattr(awq, "CLIPS", (0.8,))
    monkeypatch.setattr(lorc, "ROUNDS", 2)
    generator = torch.Generator().manual_seed(0)
    matrix, samples = torch.randn(8192, 256, generator=generator), torch.randn(512, 256, generator=generator)
    known = LayerInputs((samples.T @ samples / 512)[None], 512, samples.abs().amax(dim=0))
    scheme = parse_scheme(name)
    most, result = peak(lambda: scheme.load()(matrix, scheme.weight, known if scheme.needs_inputs else None))
    assert matrix.nbytes / 8 < most < 2 * matrix.nbytes
    most, _ = peak(lambda: dequantized(result))
    assert most < 2 * matrix.nbytes


@pytest.mark.parametrize("groups", [1, 8])
def test_learning_takes_less_than_twice_the_size_beside_the_moments(monkeypatch, groups):
    """Rows that are taken at once are few here, as they are in a large matrix."""
    monkeypatch.setattr(adaround, "STEPS", 6)
    monkeypatch.setattr(packing, "BLOCK", 1 << 14)
    monkeypatch.setattr(mse_clip, "BLOCK", 1 << 13)
    monkeypatch.setattr(runs, "FEW", 1 << 13)
    matrix = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    known = LayerInputs(torch.eye(512).expand(groups, -1, -1).contiguous(), 1)
    most, _ = peak(lambda: adaround.quantize(matrix, parse_scheme("w4").weight, known))
    assert matrix.nbytes / 8 < most < 2 * matrix.nbytes
