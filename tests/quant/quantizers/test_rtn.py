import pytest
import torch

from quant.formats import IntegerFormat
from quant.packing import decode
from quant.quantizers.rtn import quantize


def test_symmetric_values_by_hand():
    encoded = quantize(torch.tensor([[-7.0, 3.4, 0.6, 7.0], [0.0, 0.0, 0.0, 0.0]]), IntegerFormat(4))
    assert encoded.values.reshape(2, 4).tolist() == [[-7, 3, 1, 7], [0, 0, 0, 0]]
    assert encoded.scales[0].item() == 1.0
    assert encoded.zero_points is None


def test_asymmetric_values_by_hand():
    encoded = quantize(torch.tensor([[-1.0, 0.0, 2.0, 0.9]]), IntegerFormat(2, symmetric=False))
    assert encoded.values.reshape(-1).tolist() == [0, 1, 3, 2]
    assert encoded.zero_points.tolist() == [[1]]
    assert decode(encoded).tolist() == [[-1.0, 0.0, 2.0, 1.0]]


def test_one_sided_channels_keep_zero_on_the_grid():
    encoded = quantize(torch.tensor([[4.0, 5.0], [-4.0, -5.0]]), IntegerFormat(8, symmetric=False))
    assert encoded.zero_points.reshape(-1).tolist() == [0, 255]
    assert decode(encoded)[:, 1].tolist() == pytest.approx([5.0, -5.0], rel=1e-3)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_inside_the_range_no_weight_is_off_by_more_than_half_a_step(granularity):
    fmt = IntegerFormat(5, True, granularity, 8 if granularity == "group" else None, "float32")
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    encoded = quantize(weight, fmt)
    steps = encoded.scales.repeat_interleave(32 // encoded.scales.shape[1], dim=1)
    assert ((decode(encoded) - weight).abs() <= steps * 0.50001).all()


def test_scales_beyond_float16_saturate():
    encoded = quantize(torch.tensor([[1e9, -1e9, 1.0]]), IntegerFormat(2))
    assert decode(encoded).tolist() == [[65504.0, -131008.0, 0.0]]
