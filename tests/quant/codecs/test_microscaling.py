import gguf
import numpy as np
import pytest
import torch
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_mx

from quant.codecs.microscaling import closest, decode, nearest, pack
from quant.schemes import parse_scheme

MXFP4, MXFP8, NVFP4 = (parse_scheme(name).weight for name in ("mxfp4", "mxfp8", "nvfp4"))


def random_matrix(shape, seed=0):
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return normal * torch.logspace(-6, 3, shape[0]).unsqueeze(1)


@pytest.mark.parametrize(("fmt", "kind"), [(MXFP8, torch.float8_e4m3fn), (MXFP4, torch.float4_e2m1fn_x2)])
def test_scales_and_values_are_those_of_torchao(fmt, kind):
    matrix = random_matrix((40, 96))
    scale, data = to_mx(matrix, kind, 32)
    coded = nearest(matrix, fmt)
    assert torch.equal(coded.scales[0], scale.view(torch.uint8))
    theirs = data.view(torch.uint8) if fmt is MXFP8 else unpack_uint4(data.view(torch.uint8))
    assert torch.equal(coded.values.reshape(40, 96), theirs.reshape(40, 96))


def test_gguf_reads_the_same_numbers_from_mxfp4_blocks():
    coded = closest(random_matrix((8, 64)), MXFP4)
    low, high = coded.values[..., :16], coded.values[..., 16:]
    blocks = torch.cat((coded.scales[0].unsqueeze(-1), low | high << 4), dim=-1).reshape(8, -1).numpy()
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(theirs, decode(coded).numpy())


def test_nvfp4_by_hand():
    matrix = torch.zeros(2, 16)
    matrix[0, :3] = torch.tensor([6.0, -3.0, 0.6])
    matrix[1, :2] = torch.tensor([3.0, 0.25])
    coded = nearest(matrix, NVFP4)
    assert coded.scales[1].item() == pytest.approx(6 / (448 * 6))
    assert coded.scales[0].reshape(-1).tolist() == [126, 118]
    assert decode(coded)[0, :3].tolist() == pytest.approx([6.0, -3.0, 0.5])
    assert decode(coded)[1, :2].tolist() == pytest.approx([3.0, 0.25])


def test_the_tensor_scale_is_stored_once():
    packed = pack(nearest(random_matrix((4, 64)), NVFP4))
    assert [scale.nbytes for scale in packed.scales] == [16, 4]


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, NVFP4], ids=lambda fmt: fmt.name)
def test_no_block_is_worse_than_round_to_nearest(fmt):
    matrix = random_matrix((16, 128), 2)
    errors = [
        (decode(verb(matrix, fmt)) - matrix).square().reshape(16, -1, fmt.size).sum(dim=-1)
        for verb in (closest, nearest)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    assert errors[0].sum() < errors[1].sum()
