"""What every format must do, checked for every entry of FORMATS."""

from importlib import import_module
from itertools import product

import pytest
import torch

from quant.catalog import QUANTIZERS
from quant.formats import FORMATS
from quant.schemes import Scheme, parse_scheme

SHAPES = ((1, 1), (1, 7), (3, 5), (5, 33), (8, 64), (7, 97))
EXAMPLES = [(family, fmt) for family in FORMATS.values() for fmt in family.examples]
IDS = [f"{family.name}:{fmt.name}" for family, fmt in EXAMPLES]
every_format = pytest.mark.parametrize(("family", "fmt"), EXAMPLES, ids=IDS)


def writers(family):
    return [item for item in QUANTIZERS.values() if family.name in item.families and not item.adjusts]


@pytest.mark.parametrize("name", FORMATS)
def test_family_is_complete(name):
    family = FORMATS[name]
    codec = import_module(family.codec)
    assert family.name == name
    assert family.examples
    assert family.grammar
    assert family.summary
    assert family.source
    assert writers(family), "a family needs a quantizer that writes it"
    assert all(callable(getattr(codec, verb)) for verb in ("own_format", "decode", "pack", "unpack"))


@every_format
def test_both_spellings_read_back_as_the_format(family, fmt):
    assert fmt.family == family.name
    for quantizer in writers(family):
        scheme = Scheme(fmt, quantizer.name)
        assert parse_scheme(scheme.name) == parse_scheme(scheme.spelled) == scheme
        assert scheme.name.startswith(fmt.short)
        assert scheme.weight_bits == fmt.weight_bits


@every_format
def test_predicted_bytes_are_the_packed_bytes(family, fmt):
    codec = import_module(family.codec)
    generator = torch.Generator().manual_seed(0)
    for quantizer, shape in product(writers(family)[-1:], SHAPES):
        packed = codec.pack(quantizer.load()(torch.randn(shape, generator=generator), fmt))
        assert packed.nbytes == fmt.storage(shape).bytes


@every_format
def test_unpack_inverts_pack_and_decoding_is_of_the_stored_bytes(family, fmt):
    codec = import_module(family.codec)
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    encoded = writers(family)[-1].load()(weight, fmt)
    again = codec.unpack(codec.pack(encoded))
    assert torch.equal(again.values, encoded.values)
    assert torch.equal(codec.decode(again), codec.decode(encoded))
    assert codec.decode(encoded).shape == weight.shape


@every_format
def test_storage_grows_with_the_matrix_and_refusals_have_reasons(family, fmt):
    assert fmt.storage((4, 64)).bytes >= fmt.storage((4, 32)).bytes >= fmt.storage((2, 32)).bytes > 0
    assert fmt.refuses((4, 256)) is None
    assert fmt.refuses((0, 256))


@every_format
def test_a_fallback_is_a_scheme_that_takes_the_refused_matrix(family, fmt):
    for matrix in ((4, 256), (4, 96), (4, 33), (3, 1)):
        other = fmt.fallback(matrix)
        if other is not None:
            assert fmt.refuses(matrix)
            assert parse_scheme(other).weight.refuses(matrix) is None
