"""torchao through transformers: safetensors that hold the parts of torchao's tensors, values and scales ours.

Integers become `IntxUnpackedToInt8Tensor` (symmetric 8-bit ones per channel `Int8Tensor`), FP8 weights
`Float8Tensor`: `<module>.weight` is stored as `<module>._weight_qdata`, `_weight_scale` and, for integers,
`_weight_zero_point`. The header's metadata says how torchao puts them together again; torchao writes that
description itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoints.compressed import SCALES
from quant.checkpoints.protocol import CheckpointError, Layout, Wrote
from quant.checkpoints.shards import Repacked, Slot, Slots, repack
from quant.checkpoints.source import FLOATS, Source, StoredTensor
from quant.export import front, torchao
from quant.export.protocol import Deployment, Violation
from quant.integer import IntegerFormat
from quant.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf

TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "I8": "int8", "F8_E4M3": "float8_e4m3fn"}


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """The rules of the export of the same name."""
    return front.lint("torchao", deployment)


def layout(source: Source, deployment: Deployment) -> Layout:
    """The source's files with the parts of torchao's tensors, and a `quantization_config`."""
    return _repacked(source, deployment).layout


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Take one planned tensor apart at a time; all others are copied."""
    from quant.apply import encode_weight

    def encode(item: StoredTensor, weight: Tensor) -> dict[str, Tensor]:
        layer = deployment.plan.layers[item.layer]
        encoded = encode_weight(weight, layer.op, item.layer, deployment.schemes[item.layer], inputs)
        wide = torchao.stores_float32_scales(deployment.quantized[item.layer], layer.op)
        return {_part(item.layer, part): tensor for part, tensor in _parts(encoded, wide=wide).items()}

    _repacked(source, deployment).write(out, encode, wrote)


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """Put together and dequantized by torchao."""
    from quant.checkpoints.tensors import planned_weights

    return planned_weights(unpacked(Source.open(place), deployment.plan))


def unpacked(source: Source, plan: Plan) -> Iterator[tuple[str, str | None, Tensor]]:
    """Every tensor of a written folder: its name in the model, the planned layer whose weight it is, values.

    Those of torchao are dequantized to float32; one is in memory at a time.
    """
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    for file, header in source.headers.items():
        with safe_open(source.folder / file, framework="pt") as tensors:
            taken = set()
            for layer in plan.layers:
                parts = [key for key in header.tensors if key.startswith(_part(layer, ""))]
                if parts:
                    found = {key: tensors.get_tensor(key) for key in parts}
                    whole, _ = unflatten_tensor_state_dict(found, dict(header.metadata))
                    yield f"{layer}.weight", layer, _dequantized(whole[f"{layer}.weight"])
                    taken |= set(parts)
            for key in header.tensors:
                layer = key.removesuffix(".weight")
                if key not in taken:
                    yield key, layer if layer in plan.layers else None, tensors.get_tensor(key)


def _dequantized(whole: Any) -> Tensor:
    """In float32, whatever type the tensor is used in."""
    import torch

    if type(whole).__name__ == "IntxUnpackedToInt8Tensor":
        whole = whole.to(torch.float32)
        found: Tensor = whole.dequantize()
    else:
        found = whole.dequantize(torch.float32)
    return found


def _part(layer: str, part: str) -> str:
    return f"{layer}._weight_{part}"


def _repacked(source: Source, deployment: Deployment) -> Repacked:
    stored = source.stored(deployment.plan)
    for item in stored:
        if item.tensor != f"{item.layer}.weight":
            raise CheckpointError(
                f"Tensors must be named as the model names its modules. Got {item.tensor!r} for"
                f" {item.layer!r}. Save the model again with save_pretrained()."
            )
    config = torchao.files(deployment)[torchao.FILE]
    found = repack(source, stored, lambda item: _named_slots(item, deployment), config)
    told = _metadata(source, deployment, stored)
    shards = tuple(replace(shard, metadata={**shard.metadata, **told}) for shard in found.shards)
    return replace(found, shards=shards)


def _named_slots(item: StoredTensor, deployment: Deployment) -> Slots | None:
    if item.layer not in deployment.quantized:
        return None
    return {_part(item.layer, part): slot for part, slot in _slots(item, deployment).items()}


def _slots(item: StoredTensor, deployment: Deployment) -> Slots:
    """The parts of a planned tensor, (output channels, columns), and of its scales."""
    rows, columns = item.entry.shape
    facts, fmt = deployment.quantized[item.layer], deployment.schemes[item.layer].weight
    if not isinstance(fmt, IntegerFormat):
        scales = (rows if facts.granularity == "channel" else 1, 1)
        return {"qdata": Slot("F8_E4M3", (rows, columns)), "scale": Slot("F32", scales)}
    wide = torchao.stores_float32_scales(facts, deployment.layers[item.layer].op)
    scales = fmt.scales_shape((rows, columns))
    return {
        "qdata": Slot("I8", (rows, columns)),
        "scale": Slot("F32" if wide else SCALES[fmt.scale_type], scales),
        "zero_point": Slot("I8", scales),
    }


def _metadata(source: Source, deployment: Deployment, stored: tuple[StoredTensor, ...]) -> Mapping[str, str]:
    """What torchao reads about every tensor of the model; each file of a folder carries all of it."""
    planned = {item.tensor: item for item in stored if item.layer in deployment.quantized}
    names = [name for header in source.headers.values() for name in header.tensors]
    plain = json.dumps({"_type": "Tensor"})
    told = {
        name: _description(planned[name], deployment) if name in planned else plain for name in sorted(names)
    }
    return {**told, "tensor_names": json.dumps(sorted(names))}


def _description(item: StoredTensor, deployment: Deployment) -> str:
    import torch
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    slots = _slots(item, deployment)
    parts = {
        name: torch.empty(slot.shape, dtype=getattr(torch, TYPES[slot.dtype]), device="meta")
        for name, slot in slots.items()
    }
    dtype = getattr(torch, FLOATS[item.entry.dtype])
    whole = _whole(parts, deployment, item.layer, dtype)
    return json.dumps(whole, cls=TensorSubclassAttributeJSONEncoder)


def _whole(parts: Mapping[str, Tensor], deployment: Deployment, layer: str, dtype: Any) -> Any:
    """torchao's tensor of these parts; `dtype` is the type that it dequantizes to."""
    import torch
    from torchao import quantization as ao
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    facts, op = deployment.quantized[layer], deployment.layers[layer].op
    values, scales = parts["qdata"], parts["scale"]
    block = [values.shape[0] // scales.shape[0], values.shape[1] // scales.shape[1]]
    if facts.kind == "fp8_e4m3":
        return ao.Float8Tensor(values, scales, block_size=block, dtype=dtype)
    if torchao.stores_float32_scales(facts, op):
        rounding = None if facts.activation is None else QuantizeTensorToInt8Kwargs(ao.PerRow())
        return ao.Int8Tensor(
            values, scales, block, dtype, zero_point=parts["zero_point"], act_quant_kwargs=rounding
        )
    width = getattr(torch, f"int{facts.bits}")
    return ao.IntxUnpackedToInt8Tensor(values, scales, parts["zero_point"], width, block, dtype, None)


def _parts(encoded: Any, *, wide: bool) -> dict[str, Tensor]:
    """The tensors of the slots: values and zero points as signed bytes, scales."""
    import torch

    from quant.packing import Encoded

    rows, columns = encoded.matrix
    if not isinstance(encoded, Encoded):
        (scales,) = encoded.scales
        values = encoded.values.reshape(rows, columns).view(torch.float8_e4m3fn)
        return {"qdata": values, "scale": scales.float()}
    fmt = encoded.fmt
    points = encoded.zero_points
    half = 0 if points is None else 1 << (fmt.bits - 1)
    stored = torch.zeros(encoded.scales.shape, dtype=torch.int8) if points is None else points
    return {
        "qdata": (encoded.values.to(torch.int16) - half).to(torch.int8).reshape(rows, columns),
        "scale": encoded.scales.float() if wide else encoded.scales,
        "zero_point": (stored.to(torch.int16) - half).to(torch.int8),
    }
