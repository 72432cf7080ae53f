import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from quant.codecs.elements import values
from quant.codecs.floating import closest, decode, encode, nearest, pack
from quant.packing import pack_bits
from quant.schemes import parse_scheme


def random_matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8-e5m2", torch.float8_e5m2)])
@pytest.mark.parametrize("grain", ["tensor", "channel"])
def test_eight_bits_are_those_of_torch(name, dtype, grain):
    matrix, fmt = random_matrix((6, 50)), parse_scheme(f"{name}-{grain}").weight
    top = matrix.abs().amax() if grain == "tensor" else matrix.abs().amax(dim=1, keepdim=True)
    scale = top / torch.finfo(dtype).max
    expected = (matrix / scale).to(dtype)
    packed = pack(nearest(matrix, fmt))
    assert torch.equal(packed.values.view(dtype).float(), expected.float().reshape(-1))
    assert torch.equal(decode(nearest(matrix, fmt)), expected.float() * scale)


def test_four_bits_are_packed_as_compressed_tensors_packs_them():
    coded = closest(random_matrix((6, 64)), parse_scheme("fp4-g32").weight)
    numbers = values(coded.values, coded.fmt.element).reshape(6, 64)
    theirs = pack_fp4_to_uint8(numbers)
    assert torch.equal(pack(coded).values, theirs.reshape(-1))
    assert torch.equal(unpack_fp4_from_uint8(theirs, 6, 64, torch.float32), numbers)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_the_bit_stream_of_compressed_tensors(bits):
    half = 1 << (bits - 1)
    numbers = torch.randint(-half, half, (5, 64), generator=torch.Generator().manual_seed(bits)).to(
        torch.int8
    )
    theirs = pack_to_int32(numbers, bits).view(torch.uint8).reshape(-1)
    assert torch.equal(pack_bits(numbers.int() + half, bits), theirs)


def test_nf4_by_hand():
    matrix = torch.tensor([[2.0, -2.0, 0.0, 0.7, -0.4]])
    assert nearest(matrix, parse_scheme("nf4").weight).values[0, 0, :5].tolist() == [15, 0, 7, 11, 5]


@pytest.mark.parametrize("name", ["fp4", "fp4-g32", "nf4-channel", "fp8-tensor"])
def test_the_search_is_close_to_brute_force(name):
    matrix, fmt = random_matrix((12, 96), 3), parse_scheme(name).weight
    found = (decode(closest(matrix, fmt)) - matrix).square().sum()
    start = nearest(matrix, fmt)
    best = torch.full(start.scales[0].shape, torch.inf)
    for step in range(200, 620):
        tried = encode(matrix, fmt, start.scales[0].float() * step / 400)
        miss = (decode(tried) - matrix).square().reshape(*best.shape, -1)
        best = torch.minimum(best, miss.sum(dim=-1))
    assert found <= best.sum() * 1.04
