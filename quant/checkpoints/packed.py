"""Safetensors with a plan's codes and scales as its formats pack them, for `load_checkpoint`.

A layer is stored once, where the folder has its first tensor, in the bytes that the plan counts:

| tensor | holds |
|---|---|
| `NAME` | the packed stream of codes, in one dimension, so that no other loader takes it for the weight |
| `NAME_scales`, `NAME_tensor_scale`, `NAME_zero_points` | what the format keeps in tensors of its own |
| `NAME_added_left`, `_right`, `_scales` | what the quantizer adds (quant/adjusted.py) |

`NAME` is that of the stored tensor, of joined experts that of the parameter. `quantization_config` in
`config.json` says which layer each is, and the type that its weight had.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.catalog import QUANTIZERS
from quant.checkpoints.compressed import SCALES
from quant.checkpoints.protocol import CheckpointError, Layout, Wrote
from quant.checkpoints.shards import Repacked, Slot, Slots, repack
from quant.checkpoints.source import FLOATS, Source, StoredTensor
from quant.digest import DIFFUSERS_CLASS
from quant.export.protocol import Deployment, Violation
from quant.formats import BlockFormat, FloatFormat, GgufFormat, IntegerFormat, codec_of
from quant.plan import Plan
from quant.schemes import Scheme, parse_scheme
from quant.storage import Matrix

if TYPE_CHECKING:
    from torch import Tensor

    from quant.adjusted import Adjusted
    from quant.apply import InputsOf
    from quant.packing import Encoded

METHOD = "bitplan"
"""`quant_method` of the folders."""
SCALES_OF_BLOCKS = ("_scales", "_tensor_scale")


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every format packs; the configuration must name a class that `load_checkpoint` can build."""
    config = deployment.model.config
    if "model_type" in config or DIFFUSERS_CLASS in config:
        return ()
    rule = f"it must name model_type (transformers) or {DIFFUSERS_CLASS} (diffusers), by which the folder is"
    return (Violation("config.json", f"{rule} loaded: save the model with save_pretrained()", "neither"),)


def layout(source: Source, deployment: Deployment) -> Layout:
    """The source's files with packed tensors, and a `quantization_config` that names them."""
    return _repacked(source, deployment).layout


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Pack one planned tensor at a time; all others are copied. Raises NonFinite as `apply` does."""
    from quant.apply import decode_weight, encode_weight
    from quant.checkpoints.tensors import each_joined

    stored = source.stored(deployment.plan)

    def encode(item: StoredTensor, weight: Tensor) -> dict[str, Tensor]:
        if item.part_of is not None:
            ((_, weight),) = each_joined(source, [part for part in stored if part.part_of == item.part_of])
        op, scheme = deployment.plan.layers[item.layer].op, deployment.schemes[item.layer]
        made = encode_weight(weight, op, item.layer, scheme, inputs)
        decode_weight(made, weight, op, item.layer, scheme)
        return {_name(item) + part: tensor for part, tensor in _tensors(made).items()}

    _repacked(source, deployment).write(out, encode, wrote)


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """Unpacked and decoded, in the type that the weight had."""
    from quant.checkpoints.tensors import planned_weights

    return planned_weights(unpacked(Source.open(place), deployment.plan))


def unpacked(source: Source, plan: Plan) -> Iterator[tuple[str, str | None, Tensor]]:
    """Every tensor of a written folder: its name in the model, the planned layer whose weight it is, values.

    Each in the type it had before it was packed; one is in memory at a time. Raises CheckpointError where the
    folder does not hold what the plan packs.
    """
    import torch

    from quant.adjusted import dequantized
    from quant.checkpoints.tensors import reading
    from quant.ops import from_matrix

    taken = set()
    with reading(source) as read:
        for name, (layer, dtype) in _described(source, plan).items():
            decision = plan.layers[layer]
            scheme = parse_scheme(decision.scheme)
            parts = _slots(scheme, decision.matrix)
            _require_slots(source, name, parts)
            taken |= {name + part for part in parts}
            stored = _stored({part: read(name + part) for part in parts}, scheme, decision.matrix)
            matrix = dequantized(stored).to(getattr(torch, FLOATS[dtype]))
            yield name, layer, from_matrix(matrix, decision.op, decision.shape).contiguous()
        for name in source.entries:
            if name not in taken:
                yield name, None, read(name)


def _described(source: Source, plan: Plan) -> dict[str, tuple[str, str]]:
    """Name of a packed tensor -> layer, and safetensors type of the weight before. One for every layer."""
    told = source.config["quantization_config"].get("tensors")
    try:
        found = {str(name): (str(item["layer"]), str(item["dtype"])) for name, item in told.items()}
    except (AttributeError, KeyError, TypeError):
        found = {}
    layers = sorted(layer for layer, _ in found.values())
    if layers != sorted(plan.layers) or not {dtype for _, dtype in found.values()} <= set(FLOATS):
        raise CheckpointError(
            "quantization_config must describe the packed tensor of every layer of the plan."
            f" Got {json.dumps(told):.80}. Write the checkpoint again."
        )
    return found


def _require_slots(source: Source, name: str, parts: Slots) -> None:
    for part, slot in parts.items():
        _, entry = source.entries.get(name + part, (None, None))
        if entry is None or (entry.dtype, entry.shape) != (slot.dtype, slot.shape):
            got = "none" if entry is None else f"{entry.dtype} of shape {entry.shape}"
            raise CheckpointError(
                f"Tensor {name + part!r} must be {slot.dtype} of shape {slot.shape}. Got {got}."
                " Write the checkpoint again."
            )


def _repacked(source: Source, deployment: Deployment) -> Repacked:
    stored = source.stored(deployment.plan)
    first = {item.layer: item for item in reversed(stored)}

    def slots(item: StoredTensor) -> Slots:
        if first[item.layer] != item:
            return {}
        found = _slots(deployment.schemes[item.layer], deployment.plan.layers[item.layer].matrix)
        return {_name(item) + part: slot for part, slot in found.items()}

    told = {_name(item): {"layer": layer, "dtype": item.entry.dtype} for layer, item in first.items()}
    config = {
        **deployment.model.config,
        "quantization_config": {"quant_method": METHOD, "tensors": dict(sorted(told.items()))},
    }
    return repack(source, stored, slots, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _name(item: StoredTensor) -> str:
    return item.tensor if item.part_of is None else item.part_of


def _slots(scheme: Scheme, matrix: Matrix) -> dict[str, Slot]:
    """End of the name -> type and shape of every tensor that stores a weight."""
    fmt, bits = scheme.weight, scheme.weight.storage(matrix)
    found = {"": Slot("U8", (-(-bits.value_bits // 8),))}
    if isinstance(fmt, GgufFormat):
        found = {"": Slot("U8", (bits.bytes,))}
    elif isinstance(fmt, IntegerFormat | FloatFormat):
        found["_scales"] = Slot(SCALES[fmt.scale_type], fmt.scales_shape(matrix))
    elif isinstance(fmt, BlockFormat):
        found["_scales"] = Slot("U8", fmt.grouped_shape(matrix)[:2])
        if fmt.scale == "e4m3":
            found["_tensor_scale"] = Slot("F32", (1,))
    if bits.zero_point_bits and isinstance(fmt, IntegerFormat):
        found["_zero_points"] = Slot("U8", (-(-bits.zero_point_bits // 8),))
    adjusts = QUANTIZERS[scheme.quantizer].adjusts
    added = {} if adjusts is None else adjusts.shapes(matrix, scheme.parameter)
    return found | {f"_added_{name}": Slot("F16", shape) for name, shape in added.items()}


def _tensors(made: Encoded | Adjusted) -> dict[str, Tensor]:
    """The tensors of `_slots`, filled."""
    from quant.adjusted import Adjusted

    if isinstance(made, Adjusted):
        added = {f"_added_{name}": tensor for name, tensor in vars(made.addition).items()}
        return _tensors(made.stored) | added
    packed: Any = codec_of(made.fmt).pack(made)
    if isinstance(made.fmt, IntegerFormat):
        points = {} if packed.zero_points is None else {"_zero_points": packed.zero_points}
        return {"": packed.values, "_scales": packed.scales, **points}
    return {"": packed.values, **dict(zip(SCALES_OF_BLOCKS, packed.scales, strict=False))}


def _stored(parts: Mapping[str, Tensor], scheme: Scheme, matrix: Matrix) -> Encoded | Adjusted:
    """The inverse of `_tensors`."""
    from quant import packing
    from quant.adjusted import Adjusted, addition_of
    from quant.codecs import stored

    fmt: Any = scheme.weight
    if isinstance(fmt, IntegerFormat):
        packed: Any = packing.Packed(parts[""], parts["_scales"], parts.get("_zero_points"), fmt, matrix)
    else:
        scales = tuple(parts[part] for part in SCALES_OF_BLOCKS if part in parts)
        packed = stored.Packed(parts[""], scales, fmt, matrix)
    made: Encoded = codec_of(fmt).unpack(packed)
    added = {part.removeprefix("_added_"): parts[part] for part in parts if part.startswith("_added_")}
    return Adjusted(made, addition_of(added)) if added else made
