"""vLLM, and transformers with compressed-tensors: weights packed as compressed-tensors stores them.

Values, scales and zero points are the quantizer's own; they are packed by the library's functions. Each
`<module>.weight` becomes `weight_packed` (32-bit words), `weight_scale`, `weight_shape`, and for asymmetric
formats `weight_zero_point` (packed along the output channels, moved by half the range as the library does).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quant.checkpoints.protocol import Layout, Wrote
from quant.checkpoints.shards import Repacked, Slot, Slots, repack
from quant.checkpoints.source import Source, StoredTensor
from quant.export import front, vllm
from quant.export.protocol import Deployment, Violation
from quant.integer import IntegerFormat, ScaleType

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf
    from quant.packing import Encoded

SCALES: dict[ScaleType, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
EXACT = {
    "float16": ("float16",),
    "bfloat16": ("bfloat16",),
    "float32": ("float16", "bfloat16", "float32"),
}
"""Type of the model's weights, which scales are loaded in -> types of scales that it holds exactly."""


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Violations of vLLM's rules, and of what this checkpoint can hold."""
    return (*front.lint("vllm", deployment), *_integers(deployment), *_exact_scales(deployment))


def _integers(deployment: Deployment) -> Iterator[Violation]:
    for name in deployment.quantized:
        scheme = deployment.schemes[name]
        if not isinstance(scheme.weight, IntegerFormat) or scheme.activation is not None:
            yield Violation(name, "packed weights must be integers, with inputs left alone", scheme.name)


def _exact_scales(deployment: Deployment) -> Iterator[Violation]:
    config = deployment.model.config
    own = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    exact = EXACT.get(own, EXACT["float32"])
    for name in deployment.quantized:
        fmt = deployment.schemes[name].weight
        if isinstance(fmt, IntegerFormat) and fmt.scale_type not in exact:
            rule = f"scales are loaded in the model's type, so they must be {' or '.join(exact)}"
            yield Violation(name, rule, deployment.schemes[name].name)


def layout(source: Source, deployment: Deployment) -> Layout:
    """The source's files with packed tensors and a `quantization_config`."""
    return _repacked(source, deployment).layout


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Pack one planned tensor at a time; all others are copied."""
    from quant.apply import encode_weight
    from quant.packing import Encoded

    def encode(item: StoredTensor, weight: Tensor) -> dict[str, Tensor]:
        layer = deployment.plan.layers[item.layer]
        encoded = encode_weight(weight, layer.op, item.layer, deployment.schemes[item.layer], inputs)
        assert isinstance(encoded, Encoded), "the linter refuses quantizers that store more"
        return {f"{item.tensor}_{part}": tensor for part, tensor in _packed(encoded).items()}

    _repacked(source, deployment).write(out, encode, wrote)


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """Decompressed by the library, with the scheme that its own parser attaches to the module."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open

    source = Source.open(place)
    config = QuantizationConfig.model_validate(source.config["quantization_config"])
    schemes = {name: group for group in config.config_groups.values() for name in group.targets}
    files = {tensor: file for file, header in source.headers.items() for tensor in header.tensors}
    for layer, keys in source.keys(deployment.plan).items():
        for key in keys:
            parts = [name for name in files if name == f"{key}.weight" or name.startswith(f"{key}.weight_")]
            state = {}
            for name in parts:
                with safe_open(place / files[name], framework="pt") as tensors:
                    state[name.removeprefix(f"{key}.")] = tensors.get_tensor(name)
            if "weight" not in state:
                scale = state["weight_scale"].float()
                compressor = BaseCompressor.get_value_from_registry(schemes[layer].format)
                state = compressor.decompress({**state, "weight_scale": scale}, schemes[layer])
            yield layer, torch.as_tensor(state["weight"])


def _repacked(source: Source, deployment: Deployment) -> Repacked:
    def slots(item: StoredTensor) -> Slots:
        if item.layer not in deployment.quantized:
            return {}
        fmt = deployment.schemes[item.layer].weight
        assert isinstance(fmt, IntegerFormat), "the linter refuses such plans"
        return {f"{item.tensor}_{part}": slot for part, slot in _slots(item.entry.shape, fmt).items()}

    config = vllm.files(deployment)[vllm.FILE]
    return repack(source, source.stored(deployment.plan), slots, config)


def _slots(shape: tuple[int, ...], fmt: IntegerFormat) -> dict[str, Slot]:
    rows, columns = shape
    scales = fmt.scales_shape((rows, columns))
    found = {
        "packed": Slot("I32", (rows, -(-columns * fmt.bits // 32))),
        "scale": Slot(SCALES[fmt.scale_type], scales),
        "shape": Slot("I64", (2,)),
    }
    if not fmt.symmetric:
        found["zero_point"] = Slot("I32", (-(-rows * fmt.bits // 32), scales[1]))
    return found


def _packed(encoded: Encoded) -> dict[str, Tensor]:
    import torch
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    rows, columns = encoded.matrix
    bits, half = encoded.fmt.bits, 1 << (encoded.fmt.bits - 1)

    def signed(tensor: Tensor) -> Tensor:
        return tensor if encoded.fmt.symmetric else (tensor.to(torch.int16) - half).to(torch.int8)

    found = {
        "packed": pack_to_int32(signed(encoded.values).reshape(rows, columns), bits),
        "scale": encoded.scales,
        "shape": torch.tensor([rows, columns]),
    }
    if encoded.zero_points is not None:
        found["zero_point"] = pack_to_int32(signed(encoded.zero_points), bits, packed_dim=0)
    return found
