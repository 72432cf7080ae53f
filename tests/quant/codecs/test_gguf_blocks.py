import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.codecs.gguf_blocks import closest, decode, encode, nearest, pack, unpack
from quant.codecs.stored import Packed
from quant.gguf_blocks import GGUF_TYPES

every_type = pytest.mark.parametrize("fmt", GGUF_TYPES.values(), ids=lambda fmt: fmt.name)
REFERENCE = [fmt for fmt in GGUF_TYPES.values() if fmt.size == 32]


def peer(fmt):
    return gguf.GGMLQuantizationType[fmt.name.upper()]


def weights(shape, seed=0):
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return normal**3 * torch.logspace(-3, 2, shape[0]).unsqueeze(1)


@every_type
def test_block_sizes_are_those_of_the_gguf_package(fmt):
    assert gguf.GGML_QUANT_SIZES[peer(fmt)] == (fmt.size, fmt.block_bytes)


@every_type
@pytest.mark.parametrize("verb", [nearest, closest])
def test_the_gguf_package_reads_the_same_numbers_from_the_packed_bytes(fmt, verb):
    coded = verb(weights((7, 768)), fmt)
    theirs = gguf.dequantize(pack(coded).values.reshape(7, -1).numpy(), peer(fmt))
    assert np.array_equal(theirs, decode(coded).numpy())


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(GGUF_TYPES.values())), st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
def test_any_bytes_unpack_and_pack_to_themselves_and_mean_the_same(fmt, rows, blocks, seed):
    size = rows * blocks * fmt.block_bytes
    stream = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    coded = unpack(Packed(stream, (), fmt, (rows, blocks * fmt.size)))
    assert torch.equal(pack(coded).values, stream)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(stream.reshape(rows, -1).numpy(), peer(fmt))
    assert np.array_equal(theirs, decode(coded).numpy(), equal_nan=True)


@pytest.mark.parametrize("fmt", REFERENCE, ids=lambda fmt: fmt.name)
def test_round_to_nearest_writes_the_bytes_of_the_reference(fmt):
    matrix = weights((50, 640))
    matrix[3, :32] = 0
    matrix[4, :32] = 1.5
    with np.errstate(all="ignore"):
        theirs = gguf.quantize(matrix.numpy(), peer(fmt))
    assert np.array_equal(pack(nearest(matrix, fmt)).values.reshape(50, -1).numpy(), theirs)


@every_type
def test_no_block_is_worse_than_round_to_nearest_and_most_are_better(fmt):
    matrix = weights((16, 1024), 1)
    found, plain = (
        (decode(verb(matrix, fmt)).double() - matrix.double()).square().reshape(-1, fmt.size).sum(dim=-1)
        for verb in (closest, nearest)
    )
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < plain.sum()


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("q2_k", 0.0720),
        ("q3_k", 0.0215),
        ("q4_k", 0.0052),
        ("q5_k", 0.00125),
        ("q6_k", 0.00030),
        ("q4_0", 0.0069),
        ("q5_1", 0.0012),
    ],
)
def test_the_search_leaves_little_error_on_normal_weights(name, most):
    matrix = torch.randn(32, 1024, generator=torch.Generator().manual_seed(5)) / 50
    miss = decode(closest(matrix, GGUF_TYPES[name])) - matrix
    assert miss.square().sum() / matrix.square().sum() < most


@every_type
def test_encoding_with_stored_scales_changes_nothing_that_was_decoded(fmt):
    coded = closest(weights((5, 300)), fmt)
    twice = encode(decode(coded), fmt, coded.scales)
    assert torch.allclose(decode(twice), decode(coded), rtol=1e-6, atol=0)


def test_what_is_refused_and_what_llama_cpp_stores_instead():
    fallbacks = {name: fmt.fallback((8, 576)) for name, fmt in GGUF_TYPES.items()}
    assert {name: other for name, other in fallbacks.items() if other} == {
        "q2_k": "q4_0",
        "q3_k": "q4_0",
        "q4_k": "q5_0",
        "q5_k": "q5_1",
        "q6_k": "q8_0",
    }
    assert GGUF_TYPES["q4_k"].fallback((8, 100)) == "fp16"
    assert GGUF_TYPES["q4_0"].refuses((8, 100)) == "100 columns are no multiple of 32; llama.cpp stops"
