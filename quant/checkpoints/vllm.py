"""vLLM, and transformers with compressed-tensors: weights packed as compressed-tensors stores them.

Values, scales and zero points are the quantizer's own; they are packed by the library's functions. Each
`<module>.weight` becomes `weight_packed` (32-bit words), `weight_scale`, `weight_shape`, and for asymmetric
formats `weight_zero_point` (packed along the output channels, moved by half the range as the library does).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoints.joined import Joined
from quant.checkpoints.protocol import CheckpointError, Layout, Wrote
from quant.checkpoints.shards import Repacked, Slot, Slots, repack
from quant.checkpoints.source import Source, StoredTensor, holders
from quant.export import front, vllm
from quant.export.experts import linears
from quant.export.protocol import Deployment, Violation
from quant.integer import IntegerFormat, ScaleType
from quant.layers import EXPERT_OPS
from quant.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf
    from quant.packing import Encoded

PACKED = ".weight_packed"
PARTS = ("packed", "scale", "shape", "zero_point")
PART = re.compile(rf"\.weight_({'|'.join(PARTS)})$")
SCALES: dict[ScaleType, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
EXACT = {
    "float16": ("float16",),
    "bfloat16": ("bfloat16",),
    "float32": ("float16", "bfloat16", "float32"),
}
"""Type of the model's weights, which scales are loaded in -> types of scales that it holds exactly."""


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Violations of vLLM's rules, and of what this checkpoint can hold."""
    return (
        *front.lint("vllm", deployment),
        *_integers(deployment),
        *_exact_scales(deployment),
    )


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
    from quant.checkpoints.tensors import each_joined
    from quant.packing import Encoded

    def encoded(weight: Tensor, name: str) -> Encoded:
        layer = deployment.plan.layers[name]
        made = encode_weight(weight, layer.op, name, deployment.schemes[name], inputs)
        assert isinstance(made, Encoded), "the linter refuses quantizers that store more"
        return made

    @lru_cache(maxsize=2)
    def experts(parameter: str, name: str) -> dict[str, Encoded]:
        parts = [item for item in source.stored(deployment.plan) if item.part_of == parameter]
        (_, weight), *_ = each_joined(source, parts)
        return _apart(encoded(weight, name), parameter, deployment.plan.layers[name].shape, source)

    def encode(item: StoredTensor, weight: Tensor) -> dict[str, Tensor]:
        whole = item.part_of is None
        found = encoded(weight, item.layer) if whole else experts(str(item.part_of), item.layer)[item.tensor]
        return {f"{item.tensor}_{part}": tensor for part, tensor in _packed(found).items()}

    _repacked(source, deployment).write(out, encode, wrote)


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """Decompressed by the library, with the scheme that its own parser reads for the module.

    Experts are joined as transformers joins them, when the last one of a layer is known.
    """
    source, layers = Source.open(place), deployment.plan.layers
    gathered: dict[str, dict[str, Tensor]] = {}
    for name, layer, weight in unpacked(source, deployment.plan):
        if layer is None:
            continue
        if layers[layer].op not in EXPERT_OPS:
            yield layer, weight
            continue
        pieces = gathered.setdefault(layer, {})
        pieces[name] = weight
        if sum(piece.numel() for piece in pieces.values()) == layers[layer].parameters:
            joined = Joined.of(place, pieces)
            (parameter,) = joined.parts
            yield layer, joined.join(parameter, gathered.pop(layer))


def unpacked(source: Source, plan: Plan) -> Iterator[tuple[str, str | None, Tensor]]:
    """Every tensor of a written folder: its name in the model, the planned layer whose weight it is, values.

    Packed ones are decompressed to float32; one is in memory at a time.
    """
    from compressed_tensors.compressors import BaseCompressor

    files = {tensor: file for file, header in source.headers.items() for tensor in header.tensors}
    packed = {name.removesuffix(PACKED) for name in files if name.endswith(PACKED)}
    layers = _layers_by_key(source, plan, files)
    schemes = _schemes(source, plan)
    for name in files:
        key, _, part = name.rpartition(".")
        if key not in packed or not part.startswith("weight"):
            yield name, layers.get(key) if part == "weight" else None, _read(source, files, name)
        elif name.endswith(PACKED):
            parts = (f"weight_{part}" for part in PARTS if f"{key}.weight_{part}" in files)
            state = {part: _read(source, files, f"{key}.{part}") for part in parts}
            state["weight_scale"] = state["weight_scale"].float()
            layer = layers[key]
            compressor = BaseCompressor.get_value_from_registry(schemes[layer].format)
            yield f"{key}.weight", layer, compressor.decompress(state, schemes[layer])["weight"]


def _layers_by_key(source: Source, plan: Plan, tensors: Iterable[str]) -> dict[str, str]:
    """The beginning of a stored tensor's name -> layer."""
    names = list(dict.fromkeys(PART.sub(".weight", name) for name in tensors))
    found = holders(plan, names, lambda: Joined.of(source.folder, names))
    return {name.removesuffix(".weight"): layer for name, (layer, _) in found.items()}


def _schemes(source: Source, plan: Plan) -> dict[str, Any]:
    """Layer -> the scheme that the library's parser reads for it."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(source.config["quantization_config"])
    named = {name: group for group in config.config_groups.values() for name in group.targets}
    parts = {name: linears(name, layer.op, source.config)[0] for name, layer in plan.layers.items()}
    return {name: named[part] for name, part in parts.items() if part in named}


def _read(source: Source, files: Mapping[str, str], name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(source.folder / files[name], framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor


def _repacked(source: Source, deployment: Deployment) -> Repacked:
    def slots(item: StoredTensor) -> Slots:
        if item.layer not in deployment.quantized:
            return {}
        fmt = deployment.schemes[item.layer].weight
        assert isinstance(fmt, IntegerFormat), "the linter refuses such plans"
        if len(item.entry.shape) != 2:
            raise CheckpointError(
                f"Experts must be stored apart to be packed. Got {item.tensor!r} of shape {item.entry.shape}."
                " Save the model again with save_pretrained()."
            )
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


def _apart(encoded: Encoded, parameter: str, shape: tuple[int, ...], source: Source) -> dict[str, Encoded]:
    """Stored tensor -> what of the fused experts' integers and scales is its own."""
    experts, rows, columns = shape
    values = source.joined.apart(parameter, encoded.values.reshape(experts, rows, columns))
    scales = source.joined.apart(parameter, encoded.scales.reshape(experts, rows, -1))
    return {
        name: replace(encoded, values=part, scales=scales[name], matrix=(part.shape[0], part.shape[1]))
        for name, part in values.items()
    }


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
