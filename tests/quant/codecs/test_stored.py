"""Laws of all codecs beyond integers, over odd shapes and all kinds of weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.codecs import floating, microscaling
from quant.codecs.stored import BLOCK, own
from quant.formats import FORMATS, codec_of
from quant.schemes import parse_scheme

CODED = [fmt for family in FORMATS.values() if family.name != "integer" for fmt in family.examples]
KINDS = ("normal", "heavy", "shifted", "outlier", "sparse")
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 300))


def weights(kind, shape, seed=0):
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "heavy":
        return normal**3
    if kind == "shifted":
        return normal + 3
    if kind == "outlier":
        normal[:, 0] *= 100
    if kind == "sparse":
        normal[normal.abs() < 1] = 0
    return normal


def loss(coded, matrix):
    return (codec_of(coded.fmt).decode(coded).double() - matrix.double()).square().sum().item()


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(CODED), st.sampled_from(KINDS), SHAPES, st.booleans(), st.integers(0, 99))
def test_stored_bytes_are_predicted_and_nothing_stored_is_lost(fmt, kind, shape, search, seed):
    codec, matrix = codec_of(fmt), weights(kind, shape, seed)
    coded = (codec.closest if search else codec.nearest)(matrix, fmt)
    packed = codec.pack(coded)
    predicted = fmt.storage(shape)
    assert packed.nbytes == predicted.bytes
    assert packed.values.dtype == torch.uint8
    again = codec.unpack(packed)
    assert torch.equal(again.values, coded.values)
    assert len(again.scales) == len(coded.scales)
    assert all(torch.equal(one, other) for one, other in zip(again.scales, coded.scales, strict=True))
    assert torch.equal(codec.decode(again), codec.decode(coded))


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(CODED),
    st.sampled_from(KINDS),
    SHAPES,
    st.sampled_from([1e-30, 1e-7, 1.0, 1e4, 1e25]),
    st.integers(0, 99),
)
def test_the_search_never_loses_to_round_to_nearest(fmt, kind, shape, unit, seed):
    if fmt.family == "gguf":  # offered for whole blocks only
        shape = (shape[0], -(-shape[1] // fmt.size) * fmt.size)
    codec, matrix = codec_of(fmt), weights(kind, shape, seed) * unit
    assert loss(codec.closest(matrix, fmt), matrix) <= loss(codec.nearest(matrix, fmt), matrix) * (1 + 1e-5)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([*FORMATS["float"].examples, *FORMATS["microscaling"].examples]),
    SHAPES,
    st.integers(0, 99),
)
def test_encoding_what_was_decoded_changes_nothing(fmt, shape, seed):
    codec = floating if fmt.family == "float" else microscaling
    coded = codec.closest(weights("heavy", shape, seed), fmt)
    scales = coded.scales if fmt.family == "float" else (*coded.scales, None)[:2]
    twice = codec.encode(codec.decode(coded), fmt, *scales)
    assert torch.equal(codec.decode(twice), codec.decode(coded))


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8", "fp4-g32", "nf4", "mxfp4", "nvfp4", "bf16"])
def test_blocks_do_not_change_the_result(name, monkeypatch):
    fmt = parse_scheme(name).weight
    codec, matrix = codec_of(fmt), weights("heavy", (40, 320))
    whole = codec.nearest(matrix, fmt)
    monkeypatch.setattr("quant.codecs.stored.BLOCK", 700)
    parts = codec.nearest(matrix, fmt)
    assert torch.equal(codec.decode(parts), codec.decode(whole))
    assert BLOCK > 40 * 320


def test_codecs_take_their_own_family_only():
    fmt = parse_scheme("mxfp4").weight
    with pytest.raises(ValueError, match="must be of the float family. Got mxfp4. Use its own codec"):
        floating.own_format(fmt)
    assert own(fmt, "microscaling", type(fmt)) is fmt
