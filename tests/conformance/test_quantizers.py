"""What every quantizer must do, checked for every entry of QUANTIZERS."""

from functools import cache
from importlib import import_module

import pytest
import torch

from quant.activations import ACTIVATIONS
from quant.adjusted import Adjusted, dequantized
from quant.catalog import DEFAULT_QUANTIZER, QUANTIZERS
from quant.formats import FORMATS, codec_of
from quant.inputs import InputsError, LayerInputs
from quant.schemes import Scheme, parse_scheme


def weights(rows=6, columns=37, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns, rows=64, seed=1):
    """Correlated inputs; the last column is never reached."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    samples = torch.randn(rows, columns, generator=generator) @ mixing
    samples[:, -1] = 0
    return LayerInputs((samples.T @ samples / rows)[None], rows, samples.abs().amax(dim=0))


def scheme_with(quantizer, fmt, base=DEFAULT_QUANTIZER):
    """A scheme of that quantizer; one that adjusts lets `base` round."""
    if quantizer.adjusts is None:
        return Scheme(fmt, quantizer.name)
    activation = ACTIVATIONS["int8"] if quantizer.adjusts.divides_inputs else None
    number = quantizer.adjusts.default or (2 if quantizer.adjusts.parameter else 0)
    return Scheme(fmt, quantizer.name, activation, base=base, parameter=number)


def encoded(quantizer, matrix, fmt):
    scheme = scheme_with(quantizer, fmt)
    return scheme.load()(matrix, fmt, inputs(matrix.shape[1]) if scheme.needs_inputs else None)


def decoded(quantizer, matrix, fmt):
    return dequantized(encoded(quantizer, matrix, fmt))


@cache
def stored(quantizer, fmt):
    """The usual weights, encoded once for all tests."""
    return encoded(quantizer, weights(), fmt)


def examples(quantizer, family):
    """Every format for those that write all; for others some, which cover all parts of the grammar."""
    step = 12 if quantizer.adjusts else 17 if quantizer.needs_inputs else 4
    return FORMATS[family].examples[:: 1 if set(quantizer.families) == set(FORMATS) else step]


CASES = [
    (quantizer, fmt)
    for quantizer in QUANTIZERS.values()
    for family in quantizer.families
    for fmt in examples(quantizer, family)
]
every_case = pytest.mark.parametrize(
    ("quantizer", "fmt"), CASES, ids=[f"{quantizer.name}:{fmt.name}" for quantizer, fmt in CASES]
)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_entry_is_complete(name):
    quantizer = QUANTIZERS[name]
    assert quantizer.name == name
    assert quantizer.version >= 1
    assert quantizer.families
    assert set(quantizer.families) <= set(FORMATS)
    assert quantizer.summary
    assert quantizer.source
    assert quantizer.module.rsplit(".", 1)[-1] == name, "the file is named after the quantizer"
    assert import_module(quantizer.module).__doc__
    assert "-" not in name, "a hyphen parts the words of a scheme"


def test_the_default_is_listed():
    assert parse_scheme("w4").quantizer == DEFAULT_QUANTIZER
    assert DEFAULT_QUANTIZER in QUANTIZERS


@every_case
def test_shape_type_and_scheme_name_survive(quantizer, fmt):
    result = dequantized(stored(quantizer, fmt))
    assert result.shape == weights().shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    scheme = scheme_with(quantizer, fmt)
    assert parse_scheme(scheme.name) == parse_scheme(scheme.spelled) == scheme


@every_case
def test_the_error_is_far_below_the_weights(quantizer, fmt):
    matrix = weights()
    error = (dequantized(stored(quantizer, fmt)) - matrix).square().sum() / matrix.square().sum()
    assert error < 1.0
    assert error < 0.02 or fmt.weight_bits <= 4


@every_case
def test_same_weights_same_result_and_the_input_is_untouched(quantizer, fmt):
    matrix = weights()
    assert torch.equal(decoded(quantizer, matrix, fmt), dequantized(stored(quantizer, fmt)))
    assert torch.equal(matrix, weights())


@every_case
def test_zero_tiny_and_huge_channels_stay_finite(quantizer, fmt):
    matrix = weights(5, 24)
    matrix[0] = 0
    matrix[1] *= 1e-9
    matrix[2] *= 1e30
    matrix[3] *= 1e-40
    result = decoded(quantizer, matrix, fmt)
    assert torch.isfinite(result).all()
    assert (result[0] == 0).all()


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_read(name, dtype):
    quantizer = QUANTIZERS[name]
    for family in quantizer.families:
        fmt = FORMATS[family].examples[-1]
        matrix = weights().to(dtype)
        assert torch.equal(decoded(quantizer, matrix, fmt), decoded(quantizer, matrix.float(), fmt))


@every_case
def test_it_stores_what_its_format_says(quantizer, fmt):
    result, added = stored(quantizer, fmt), ()
    if isinstance(result, Adjusted):
        result, added = result.stored, result.addition.tensors
    assert all(tensor.dtype == torch.float16 for tensor in added)
    nbytes = codec_of(fmt).pack(result).nbytes + sum(tensor.nbytes for tensor in added)
    assert nbytes == scheme_with(quantizer, fmt).storage((6, 37)).bytes


WEIGHTS_ALONE = [q for q in QUANTIZERS.values() if not (q.adjusts and q.adjusts.divides_inputs)]
"""Quantizers that promise something about weights alone, not about rounded inputs."""
ADJUSTING = [quantizer for quantizer in WEIGHTS_ALONE if quantizer.adjusts]


LEARNED = {"adaround", "adaquant"}


def costly(name):
    """Quantizers that learn wait for the slow suite here."""
    return pytest.param(name, marks=pytest.mark.slow) if name in LEARNED else name


@pytest.mark.parametrize("quantizer", ADJUSTING, ids=[quantizer.name for quantizer in ADJUSTING])
@pytest.mark.parametrize("base", [costly(name) for name, entry in QUANTIZERS.items() if not entry.adjusts])
def test_a_matrix_is_never_worse_than_with_the_base_alone(quantizer, base):
    for family in set(quantizer.families) & set(QUANTIZERS[base].families):
        for fmt in examples(quantizer, family)[1 :: 16 if QUANTIZERS[base].needs_inputs else 2]:
            matrix, scheme = weights(12, 37, seed=2), scheme_with(quantizer, fmt, base)
            known = inputs(37) if scheme.needs_inputs else None
            plain = QUANTIZERS[base].load()(matrix, fmt, known)
            ours, theirs = (
                dequantized(result) - matrix for result in (scheme.load()(matrix, fmt, known), plain)
            )
            ours, theirs = (
                error.square() if known is None else known.output_errors(error) for error in (ours, theirs)
            )
            assert ours.sum() <= theirs.sum() * (1 + 1e-4), fmt.name


@every_case
def test_its_own_objective_is_never_above_rtn(quantizer, fmt):
    """Sum of |error|^2 per channel, or what the module says instead of 2; informed ones have another test."""
    power = getattr(import_module(quantizer.module), "POWER", 2)
    if quantizer.needs_inputs:
        return
    matrix = weights(12, 37, seed=3)
    matrix[1] *= 1e-3
    ours, theirs = (
        (decoded(chosen, matrix, fmt) - matrix).abs().double().pow(power).sum(1)
        for chosen in (quantizer, QUANTIZERS["rtn"])
    )
    if getattr(fmt, "granularity", "") == "tensor" or quantizer.adjusts:
        ours, theirs = ours.sum(), theirs.sum()
    assert (ours <= theirs * (1 + 1e-4)).all()


INFORMED = [quantizer for quantizer in QUANTIZERS.values() if quantizer.needs_inputs]


@pytest.mark.parametrize("name", [quantizer.name for quantizer in WEIGHTS_ALONE if quantizer.needs_inputs])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_output_error_is_never_above_rtn(name, seed):
    quantizer = QUANTIZERS[name]
    matrix, known = weights(12, 37, seed), inputs(37, seed=seed + 10)
    for family in quantizer.families:
        for fmt in examples(quantizer, family):
            ours, theirs = (
                known.output_errors(decoded_with(chosen, matrix, fmt, known) - matrix)
                for chosen in (quantizer, QUANTIZERS["rtn"])
            )
            if getattr(fmt, "granularity", "") == "tensor" or quantizer.adjusts:
                ours, theirs = ours.sum(), theirs.sum()
            assert (ours <= theirs * (1 + 1e-4)).all(), fmt.name


@pytest.mark.parametrize("quantizer", INFORMED, ids=[quantizer.name for quantizer in INFORMED])
def test_missing_or_foreign_statistics_are_refused(quantizer):
    fmt = FORMATS[quantizer.families[0]].examples[0]
    with pytest.raises(InputsError, match="must be given statistics of the layer's inputs. Got none"):
        decoded_with(quantizer, weights(), fmt, None)
    with pytest.raises(InputsError, match=r"must be \(groups, 37, 37\).*Got \(1, 36, 36\)"):
        decoded_with(quantizer, weights(), fmt, inputs(36))


@pytest.mark.parametrize("name", [quantizer.name for quantizer in INFORMED if not quantizer.adjusts])
def test_groups_of_channels_are_quantized_for_their_own_inputs(name):
    quantizer = QUANTIZERS[name]
    fmt = parse_scheme("w3").weight
    first, second = inputs(9, seed=1), inputs(9, seed=2)
    both = LayerInputs(torch.cat([first.second_moments, second.second_moments]), 64)
    matrix = weights(8, 9)
    together = decoded_with(quantizer, matrix, fmt, both)
    assert torch.allclose(together[:4], decoded_with(quantizer, matrix[:4], fmt, first))
    assert torch.allclose(together[4:], decoded_with(quantizer, matrix[4:], fmt, second))


def decoded_with(quantizer, matrix, fmt, known):
    return dequantized(scheme_with(quantizer, fmt).load()(matrix, fmt, known))
