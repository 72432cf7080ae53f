import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats import IntegerFormat
from quant.packing import (
    BLOCK,
    decode,
    encode,
    group,
    own_format,
    pack,
    pack_bits,
    stored_scale,
    ungroup,
    unpack,
    unpack_bits,
)
from quant.quantizers import mse_clip, rtn

SHAPES = st.tuples(st.integers(1, 19), st.integers(1, 70))


@st.composite
def formats(draw):
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    return IntegerFormat(
        bits=draw(st.integers(2, 8)),
        symmetric=draw(st.booleans()),
        granularity=granularity,
        group_size=draw(st.integers(1, 90)) if granularity == "group" else None,
        scale_type=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )


def random_matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_bits(values, bits):
    """The naive stream: the lowest bit of the first value first."""
    stream = [value >> place & 1 for value in values for place in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [
        sum(bit << place for place, bit in enumerate(stream[at : at + 8])) for at in range(0, len(stream), 8)
    ]


@settings(deadline=None, max_examples=300)
@given(formats(), SHAPES, st.integers(0, 99))
def test_predicted_bytes_equal_the_packed_tensors(fmt, shape, seed):
    packed = pack(rtn.quantize(random_matrix(shape, seed), fmt))
    predicted = fmt.storage(shape)
    assert packed.nbytes == predicted.bytes
    assert packed.values.nbytes == -(-predicted.value_bits // 8)
    assert packed.scales.nbytes * 8 == predicted.scale_bits
    points = 0 if packed.zero_points is None else packed.zero_points.nbytes
    assert points == -(-predicted.zero_point_bits // 8)


@settings(deadline=None, max_examples=150)
@given(formats(), SHAPES, st.integers(0, 99))
def test_packing_and_encoding_lose_nothing_that_is_stored(fmt, shape, seed):
    encoded = mse_clip.quantize(random_matrix(shape, seed), fmt)
    again = unpack(pack(encoded))
    for name in ("values", "scales", "zero_points"):
        before, after = getattr(encoded, name), getattr(again, name)
        assert (before is None and after is None) or (
            before.dtype == after.dtype and torch.equal(before, after)
        )
    twice = encode(decode(encoded), fmt, encoded.scales, encoded.zero_points)
    assert torch.equal(decode(twice), decode(encoded))


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_the_bit_stream_is_the_naive_one(bits, values):
    values = [value & (1 << bits) - 1 for value in values]
    stream = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
    assert stream.tolist() == as_bits(values, bits)
    assert unpack_bits(stream, bits, len(values)).tolist() == values


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_streams_longer_than_a_block(bits):
    values = torch.randint(0, 1 << bits, (2 * BLOCK + 13,), generator=torch.Generator().manual_seed(0))
    stream = pack_bits(values, bits)
    assert stream.numel() == -(-values.numel() * bits // 8)
    assert torch.equal(unpack_bits(stream, bits, values.numel()).to(values.dtype), values)


def test_ungroup_inverts_group_and_padding_is_zero():
    matrix = random_matrix((3, 7))
    grouped = group(matrix, IntegerFormat(4, granularity="group", group_size=4))
    assert grouped.shape == (3, 2, 4)
    assert (grouped[:, 1, 3] == 0).all()
    assert torch.equal(ungroup(grouped, (3, 7)), matrix)


def test_stored_scales_are_positive_and_finite():
    scales = torch.tensor([0.0, 1e-30, 0.1, 1e30])
    assert stored_scale(scales, "float16").tolist() == [2**-24, 2**-24, 0.0999755859375, 65504.0]
    assert torch.isfinite(stored_scale(torch.tensor([3.4e38]), "bfloat16")).all()
    assert stored_scale(scales, "float32")[0] > 0


def test_weights_are_rounded_to_the_scale_that_is_stored():
    fmt = IntegerFormat(8, scale_type="bfloat16")
    encoded = rtn.quantize(random_matrix((4, 50)), fmt)
    grid = encoded.scales.float()
    nearest = (random_matrix((4, 50)) / grid).round().clamp(-128, 127) * grid
    assert torch.equal(decode(encoded), nearest)


def test_zero_points_belong_to_asymmetric_formats():
    with pytest.raises(ValueError, match="Zero points must be given for asymmetric formats"):
        encode(random_matrix((2, 3)), IntegerFormat(4), torch.ones(2), torch.zeros(2))


def test_the_codec_takes_its_own_family_only():
    class Other:
        family, name = "float", "fp8"

    with pytest.raises(ValueError, match="must be of the integer family. Got fp8"):
        own_format(Other())
