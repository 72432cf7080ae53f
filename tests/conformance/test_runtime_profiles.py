"""Runtime profiles against the installed packages: what a profile takes, the package really builds and runs.

Each question is put to the package for a linear layer of 64 x 320: is there a tensor, node or type for this
scheme, and does it stand for the values of the format?
"""

from functools import cache

import numpy as np
import pytest
import torch

from quant.formats import codec_of
from quant.integer import IntegerFormat
from quant.packing import decode
from quant.quantizers.rtn import quantize
from quant.runtime_rules import Target
from quant.runtimes import RUNTIMES
from quant.schemes import parse_scheme

MATRIX = (64, 320)
GRAINS = ("", "-tensor", "-g8", "-g16", "-g32", "-g48", "-g64", "-g128", "-g256")
INTEGERS = tuple(
    f"w{bits}{grain}{sign}" for bits in range(2, 9) for grain in GRAINS for sign in ("", "-asym")
)
FLOATS = ("fp8", "fp8-tensor", "fp8-e5m2", "fp4", "nf4", "mxfp4", "mxfp8", "nvfp4")
GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


@cache
def weight(columns=MATRIX[1]):
    return torch.randn(MATRIX[0], columns, generator=torch.Generator().manual_seed(11)) * 0.1


def takes(runtime, scheme, matrix=MATRIX):
    target = Target("layers.0.fc", "linear", matrix, False, False)
    return RUNTIMES[runtime].refuses(target, parse_scheme(scheme)) is None


def in_onnxruntime(fmt):
    """A MatMulNBits node computes what the format stands for."""
    import onnxruntime
    from onnx import helper, numpy_helper

    from quant.checkpoints.onnx_model import node_values

    if not isinstance(fmt, IntegerFormat):
        return False
    encoded = quantize(weight(), fmt)
    rows, columns = MATRIX
    if encoded.scales.shape[0] != rows:
        return False
    blocks, names = encoded.values.shape[1], ("values", "scales", "points")
    shapes = ((rows, blocks, -1), (rows, blocks), (rows, -1))
    tensors = [
        tensor.reshape(shape).numpy() for tensor, shape in zip(node_values(encoded), shapes, strict=False)
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", *names[: len(tensors)]], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=fmt.bits, block_size=fmt.group_size or columns,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", 1, ["n", columns])],
        [helper.make_tensor_value_info("y", 1, ["n", rows])],
        [numpy_helper.from_array(tensor, name) for tensor, name in zip(tensors, names, strict=False)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, quiet, providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0]
    except Exception:
        return False
    return np.allclose(found, decode(encoded).T.numpy(), rtol=1e-5, atol=1e-6)


def in_torchao(fmt):
    """A stable configuration makes a tensor of the same number type, granularity and symmetry, and it runs."""
    from torchao import quantization as ao

    layer = torch.nn.Linear(MATRIX[1], MATRIX[0], bias=False)
    layer.weight = torch.nn.Parameter(weight().clone(), requires_grad=False)
    kind = ao.MappingType
    try:
        if isinstance(fmt, IntegerFormat):
            grain = {"tensor": ao.PerTensor(), "channel": ao.PerAxis(0)}.get(fmt.granularity)
            config = ao.IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{fmt.bits}"),
                granularity=grain or ao.PerGroup(fmt.group_size),
                mapping_type=kind.SYMMETRIC if fmt.symmetric else kind.ASYMMETRIC,
            )
        elif fmt.short in ("fp8", "fp8-tensor", "fp8-e5m2"):
            config = ao.Float8WeightOnlyConfig(
                granularity=ao.PerTensor() if fmt.granularity == "tensor" else ao.PerRow(),
                weight_dtype=torch.float8_e5m2 if "e5m2" in fmt.short else torch.float8_e4m3fn,
                set_inductor_config=False,
            )
        else:
            return False
        ao.quantize_(layer, config)
    except Exception:
        return False
    dense = layer.weight.dequantize()
    error = float((dense - weight()).norm() / weight().norm())
    return (
        error < 2.0 ** (1.5 - fmt.weight_bits) * 4 and torch.isfinite(layer(torch.randn(2, MATRIX[1]))).all()
    )


def in_mlx(fmt):
    """MLX cuts such groups, and decodes our packed blocks to our values. Its affine mode always has a bias."""
    import mlx.core as mx

    if isinstance(fmt, IntegerFormat):
        mode = {"group_size": fmt.group_size or MATRIX[1], "bits": fmt.bits, "mode": "affine"}
        try:
            stored = mx.quantize(mx.array(weight().numpy()), **mode)
        except (ValueError, RuntimeError):
            return False
        return len(stored) == 3 and not fmt.symmetric and fmt.granularity == "group"
    codec = codec_of(fmt)
    coded = codec.nearest(weight(), fmt)
    packed = codec.pack(coded)
    values = mx.array(packed.values.numpy().view(np.uint32).reshape(MATRIX[0], -1))
    scales = mx.array(packed.scales[0].view(torch.uint8).numpy().reshape(MATRIX[0], -1))
    found = mx.dequantize(values, scales, mode=fmt.short).astype(mx.float32)
    return np.array_equal(np.array(found), codec.decode(coded).numpy())


def in_gguf(fmt, columns=MATRIX[1]):
    """The gguf package knows the type, its rows are whole blocks, and it decodes our bytes to our values."""
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, fmt.short.upper(), None)
    if kind is None:
        return False
    try:
        shape = gguf.quant_shape_to_byte_shape((MATRIX[0], columns), kind)
    except ValueError:
        return False
    codec = codec_of(fmt)
    coded = codec.nearest(weight(columns), fmt)
    found = gguf.dequantize(codec.pack(coded).values.numpy().reshape(shape), kind)
    return np.array_equal(found, codec.decode(coded).numpy())


@pytest.mark.parametrize(
    ("runtime", "built"), [("onnxruntime", in_onnxruntime), ("torchao", in_torchao), ("mlx", in_mlx)]
)
def test_a_profile_takes_exactly_the_integers_that_the_package_builds(runtime, built):
    wrong = [name for name in INTEGERS if takes(runtime, name) != bool(built(parse_scheme(name).weight))]
    assert wrong == []


@pytest.mark.parametrize(("runtime", "built"), [("torchao", in_torchao), ("mlx", in_mlx)])
def test_every_float_format_that_a_profile_takes_is_built(runtime, built):
    taken = [name for name in FLOATS if takes(runtime, name)]
    assert taken
    assert [name for name in taken if not built(parse_scheme(name).weight)] == []


def test_mlx_has_a_mode_for_nvfp4_that_is_another_format():
    assert not in_mlx(parse_scheme("nvfp4").weight)
    assert not takes("mlx", "nvfp4")


@pytest.mark.parametrize("columns", [320, 512])
@pytest.mark.parametrize("name", [*GGUF, "w4", "fp8", "nf4"])
def test_llama_cpp_takes_exactly_the_types_of_gguf(name, columns):
    assert takes("llama.cpp", name, (MATRIX[0], columns)) == in_gguf(parse_scheme(name).weight, columns)
