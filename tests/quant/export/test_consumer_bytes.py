"""Predicted bytes are those of the tensors that the consumers' own libraries make."""

import pytest

from quant.export import auto_round, mlx, vllm
from quant.export.compressed_config import config_groups


@pytest.mark.parametrize(
    "scheme",
    [
        "w3",
        "w4-g32-asym",
        "w8-asym",
        "w4-g32-aint8",
        "w8-aint8",
        "w8-bfloat16-aint8s",
        "fp8",
        "fp8-tensor-afp8s",
        "nvfp4",
        "nvfp4-anvfp4s",
        "mxfp4",
        "mxfp8-amxfp8",
    ],
)
def test_bytes_in_compressed_tensors_are_those_of_the_library(scheme, inventories, deploy):
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    found = deploy(inventories["cnn"], {"head": scheme}, kept=("stem", "block.conv"))
    group = config_groups(found)["group_0"]
    weights = group["weights"]
    columns = 1 if weights["group_size"] is None else 128 // weights["group_size"]
    shape = (1, 1) if weights["strategy"] == "tensor" else (128, columns)
    scales = getattr(found.schemes["head"].weight, "scale_type", "float32")
    state = {
        "weight": torch.randn(128, 128),
        "weight_scale": (torch.rand(shape) + 0.1).to(getattr(torch, scales)),
    }
    if not weights["symmetric"]:
        state["weight_zero_point"] = torch.zeros(shape, dtype=torch.int8)
    if scheme.startswith("nvfp4"):
        state["weight_global_scale"] = torch.ones(1)
    if (group["input_activations"] or {"dynamic": True})["dynamic"] is not True:
        state["input_scale"] = torch.ones(1)
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    packed = compressor.compress(state, QuantizationScheme.model_validate(group))
    assert vllm.stored_bytes(found) == sum(tensor.nbytes for tensor in packed.values())


@pytest.mark.parametrize(
    ("scheme", "mode", "bits", "group"),
    [("w3-g64-asym", "affine", 3, 64), ("mxfp4", "mxfp4", 4, 32), ("mxfp8", "mxfp8", 8, 32)],
)
def test_bytes_in_mlx_are_those_of_its_arrays(scheme, mode, bits, group, inventories, deploy):
    import mlx.core as mx

    found = deploy(inventories["cnn"], {"head": scheme}, kept=("stem", "block.conv"))
    packed = mx.quantize(mx.ones((128, 128), dtype=mx.float16), group_size=group, bits=bits, mode=mode)
    assert mlx.stored_bytes(found) == sum(array.nbytes for array in packed)


@pytest.mark.parametrize("scheme", ["w2-g16", "w3", "w4-g128-asym", "w6-g32", "w8"])
def test_bytes_in_auto_round_are_those_of_its_modules(scheme, inventories, deploy):
    from auto_round_extension.torch.qlinear_torch import QuantLinear

    found = deploy(inventories["cnn"], {"head": scheme}, kept=("stem", "block.conv"))
    (facts,) = found.quantized.values()
    module = QuantLinear(facts.bits, facts.group_size or -1, 128, 128, bias=False)
    assert auto_round.stored_bytes(found) == sum(buffer.nbytes for buffer in module.buffers())
