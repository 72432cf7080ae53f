import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from quant.codecs.kv_cache import round_cached
from quant.geometry import CACHE_BITS


def sample(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    ("kind", "theirs"), [("fp8_e4m3", ml_dtypes.float8_e4m3fn), ("fp8_e5m2", ml_dtypes.float8_e5m2)]
)
def test_floats_agree_with_ml_dtypes(kind, theirs):
    values = sample(2, 3, 5, 16)
    assert np.array_equal(
        round_cached(values, kind).numpy(), values.numpy().astype(theirs).astype(np.float32)
    )


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_integers_agree_with_compressed_tensors_per_token_and_head(kind, bits):
    values = sample(2, 3, 5, 16)
    scales = (values.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
    args = QuantizationArgs(num_bits=bits, type="int", strategy="token", symmetric=True, dynamic=True)
    theirs = fake_quantize(values, scales, torch.zeros_like(scales), args)
    assert torch.equal(round_cached(values, kind), theirs)


@pytest.mark.parametrize("kind", CACHE_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_type_are_kept_and_extremes_stay_finite(kind, dtype):
    values = sample(1, 2, 4, 8).to(dtype)
    values[0, 0, 0] = 0
    values[0, 0, 1] = 6e4 if kind == "float16" else 1e30
    found = round_cached(values, kind)
    assert (found.shape, found.dtype) == (values.shape, dtype)
    assert torch.isfinite(found).all()
    assert not found[0, 0, 0].any()
