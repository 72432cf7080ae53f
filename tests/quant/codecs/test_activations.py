"""Rounding of activations against other implementations, and the choice of static ranges."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given
from hypothesis import strategies as st

from quant.activations import ACTIVATIONS
from quant.codecs.activations import BINS, CLIPS, Magnitudes, best_range, round_input
from quant.codecs.microscaling import decode, nearest
from quant.microscaling import BLOCKS

every_format = pytest.mark.parametrize("fmt", ACTIVATIONS.values(), ids=ACTIVATIONS)
STATIC = [fmt for fmt in ACTIVATIONS.values() if fmt.static]


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def rounded(values, name, limit=None, op="linear"):
    return round_input(values, ACTIVATIONS[name], op, limit)


@pytest.mark.parametrize(("name", "bits", "kind", "top"), [("int8", 8, "int", 127), ("int4", 4, "int", 7), ("fp8", 8, "float", 448)])  # fmt: skip
def test_dynamic_formats_agree_with_compressed_tensors_per_token(name, bits, kind, top):
    values = sample(2, 5, 64)
    args = QuantizationArgs(num_bits=bits, type=kind, strategy="token", symmetric=True, dynamic=True)
    scales = values.abs().amax(dim=-1, keepdim=True) / top
    assert torch.equal(rounded(values, name), fake_quantize(values, scales, torch.zeros_like(scales), args))


@pytest.mark.parametrize(("name", "bits", "kind", "top"), [("int8s", 8, "int", 127), ("int4s", 4, "int", 7), ("fp8s", 8, "float", 448)])  # fmt: skip
def test_static_formats_agree_with_compressed_tensors_per_tensor(name, bits, kind, top):
    values = sample(6, 64)
    args = QuantizationArgs(num_bits=bits, type=kind, strategy="tensor", symmetric=True)
    scale = torch.tensor([4.0]) / top
    assert torch.equal(rounded(values, name, 4.0), fake_quantize(values, scale, torch.zeros(1), args))


def test_static_integers_agree_with_torch():
    values, scale = sample(6, 64), float(torch.tensor(4.0) / 127)
    theirs = torch.fake_quantize_per_tensor_affine(values, scale, 0, -128, 127)
    torch.testing.assert_close(rounded(values, "int8s", 4.0), theirs, rtol=0, atol=scale * 1.001)
    assert (rounded(values, "int8s", 4.0) != theirs).float().mean() < 0.001  # torch multiplies by 1 / scale


@pytest.mark.parametrize(("name", "kind", "top"), [("fp8", ml_dtypes.float8_e4m3fn, 448)])
def test_floats_round_as_ml_dtypes_does(name, kind, top):
    values = sample(4, 32)
    scales = (values.abs().amax(dim=-1, keepdim=True) / top).numpy()
    theirs = (values.numpy() / scales).astype(kind).astype(np.float32) * scales
    assert np.array_equal(rounded(values, name).numpy(), theirs)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_blocks_are_the_weights_blocks_token_by_token(name):
    """The codec of weights is checked against torchao; its tensor scale is that of one token here."""
    values = sample(5, 96)
    values[2] = 0
    values[3, 32:64] = 0
    theirs = torch.cat([decode(nearest(row[None], BLOCKS[name])) for row in values])
    torch.testing.assert_close(rounded(values, name), theirs, rtol=2e-7, atol=0)


def test_static_nvfp4_agrees_with_compressed_tensors():
    values, limit = sample(3, 64), 20.0
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", symmetric=True, group_size=16)
    outer = torch.tensor([448 * 6 / limit])  # they keep the inverse
    largest = values.reshape(3, 4, 16).abs().amax(dim=-1)
    scales = (largest / 6 * outer).to(torch.float8_e4m3fn).float()
    theirs = fake_quantize(values, scales, torch.zeros_like(scales), args, global_scale=outer)
    torch.testing.assert_close(rounded(values, "nvfp4s", limit), theirs, rtol=1e-6, atol=0)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_and_type_are_kept_and_rounding_twice_changes_nothing_more(fmt, dtype):
    values = sample(2, 3, 32).to(dtype)
    limit = 5.0 if fmt.static else None
    once = round_input(values, fmt, "linear", limit)
    assert (once.shape, once.dtype) == (values.shape, dtype)
    assert not torch.equal(once, values)
    if dtype == torch.float32:
        torch.testing.assert_close(round_input(once, fmt, "linear", limit), once, rtol=1e-6, atol=1e-7)


@every_format
def test_tokens_do_not_see_each_other(fmt):
    values, limit = sample(4, 32), 5.0 if fmt.static else None
    alone = torch.cat([round_input(row[None], fmt, "linear", limit) for row in values])
    assert torch.equal(alone, round_input(values, fmt, "linear", limit))


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_convolutions_take_one_scale_per_sample(name):
    images = sample(3, 2, 5, 5) * torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1, 1)
    theirs = rounded(images.reshape(3, -1), name).reshape(images.shape)
    assert torch.equal(rounded(images, name, op="conv2d"), theirs)
    assert torch.equal(rounded(images[0], name, op="conv2d"), theirs[0])
    assert torch.equal(
        rounded(images[0], name, op="conv1d"), rounded(images[0].reshape(2, -1), name).reshape(2, 5, 5)
    )


@every_format
@pytest.mark.parametrize("value", [0.0, 1e-42, -1e-38, 3e38])
def test_extreme_values_stay_finite(fmt, value):
    values = torch.full((2, 32), value)
    assert torch.isfinite(round_input(values, fmt, "linear", 1.0 if fmt.static else None)).all()


@every_format
def test_values_that_are_no_numbers_are_not_hidden(fmt):
    values = sample(1, 32)
    values[0, 3] = torch.nan
    assert not torch.isfinite(round_input(values, fmt, "linear", 1.0 if fmt.static else None)).all()


def test_a_static_format_without_a_range_says_so():
    with pytest.raises(ValueError, match="must be given a range"):
        rounded(sample(1, 8), "int8s")


@given(st.lists(st.integers(0, 500), min_size=1, max_size=4), st.integers(0, 5))
def test_counts_do_not_depend_on_how_data_come(cuts, seed):
    values = sample(500, seed=seed)
    whole, parts = Magnitudes.none().plus(values), Magnitudes.none()
    for piece in reversed(torch.tensor_split(values, sorted(cuts))):
        parts = parts.plus(piece)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == 500
    assert whole.largest == parts.largest == float(values.abs().max())


def test_bins_are_bfloat16_magnitudes():
    values = torch.tensor([1.0, -1.0, 1.0078125, 0.0, 3e38])
    counts = Magnitudes.none().plus(values).counts
    assert {int(b): int(counts[b]) for b in counts.nonzero()} == {0: 1, 0x3F80: 2, 0x3F81: 1, 0x7F61: 1}
    assert len(counts) == BINS


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_infinite_inputs_are_noticed(value):
    assert not Magnitudes.none().plus(torch.tensor([1.0, value])).finite
    assert Magnitudes.none().plus(torch.tensor([1.0, 3e38])).finite


@pytest.mark.parametrize("fmt", [fmt for fmt in STATIC if not fmt.block], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", ["normal", "outliers", "relu"])
def test_the_range_is_nearly_as_good_as_the_best_of_all_that_are_tried(fmt, shape):
    """Chosen from counts, judged on the values themselves."""
    values = sample(1, 40_000)
    if shape == "outliers":
        values[0, :5] *= 30
    if shape == "relu":
        values = values.relu()
    limit = best_range(Magnitudes.none().plus(values), fmt)

    def error(tried):
        return float((round_input(values, fmt, "linear", tried) - values).double().square().sum())

    best = min(error(clip * float(values.abs().max())) for clip in CLIPS)
    assert error(limit) <= best * 1.02
    assert error(limit) <= error(float(values.abs().max()))
    assert limit == float(torch.tensor(limit, dtype=torch.float32))


def test_blocks_keep_the_largest_magnitude_and_nothing_gives_one():
    seen = Magnitudes.none().plus(sample(100))
    assert best_range(seen, ACTIVATIONS["nvfp4s"]) == seen.largest
    assert {best_range(Magnitudes.none().plus(torch.zeros(3)), fmt) for fmt in STATIC} == {1.0}
