"""What every quantizer must do, checked for every entry of QUANTIZERS."""

from importlib import import_module

import pytest
import torch

from quant.catalog import DEFAULT_QUANTIZER, QUANTIZERS
from quant.formats import FORMATS
from quant.schemes import Scheme, parse_scheme

CASES = [
    (quantizer, fmt)
    for quantizer in QUANTIZERS.values()
    for family in quantizer.families
    for fmt in FORMATS[family].examples
]
every_case = pytest.mark.parametrize(
    ("quantizer", "fmt"), CASES, ids=[f"{quantizer.name}:{fmt.name}" for quantizer, fmt in CASES]
)


def weights(rows=6, columns=37, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decoded(quantizer, matrix, fmt):
    return import_module(FORMATS[fmt.family].codec).decode(quantizer.load()(matrix, fmt))


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
    matrix = weights()
    result = decoded(quantizer, matrix, fmt)
    assert result.shape == matrix.shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    assert parse_scheme(Scheme(fmt, quantizer.name).name).quantizer == quantizer.name


@every_case
def test_the_error_is_far_below_the_weights(quantizer, fmt):
    matrix = weights()
    error = (decoded(quantizer, matrix, fmt) - matrix).square().sum() / matrix.square().sum()
    assert error < 1.0
    assert error < 0.02 or fmt.weight_bits <= 4


@every_case
def test_same_weights_same_result_and_the_input_is_untouched(quantizer, fmt):
    matrix = weights()
    kept = matrix.clone()
    assert torch.equal(decoded(quantizer, matrix, fmt), decoded(quantizer, matrix, fmt))
    assert torch.equal(matrix, kept)


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
