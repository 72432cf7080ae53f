"""vLLM, and transformers with compressed-tensors: weights as compressed-tensors stores them.

Each module's tensors are those of its format (`quant/checkpoints/compressed.py`); `config.json` says which
format that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoints import compressed
from quant.checkpoints.joined import Joined
from quant.checkpoints.protocol import CheckpointError, Layout, Wrote
from quant.checkpoints.shards import Repacked, Slot, Slots, repack
from quant.checkpoints.source import Places, Source, StoredTensor
from quant.export import front, vllm
from quant.export.compressed_config import tensor_format
from quant.export.experts import linears
from quant.export.protocol import Deployment, Violation
from quant.integer import IntegerFormat
from quant.layers import EXPERT_OPS
from quant.plan import Plan
from quant.runtime_rules import HELD_SCALES
from quant.storage import Matrix

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf
    from quant.packing import Encoded

SCALE = ".weight_scale"
PART = re.compile(r"\.weight_\w+$")
CACHE_SCALES = ("k_scale", "v_scale")
ONES = {
    "float16": ("F16", b"\x00\x3c"),
    "bfloat16": ("BF16", b"\x80\x3f"),
    "float32": ("F32", b"\x00\x00\x80\x3f"),
}
"""Type of the model's weights -> its name in safetensors, and the bytes of 1."""


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Violations of vLLM's rules, and of what this checkpoint can hold."""
    return (
        *front.lint("vllm", deployment),
        *_scales_at_run_time(deployment),
        *_exact_scales(deployment),
    )


def _scales_at_run_time(deployment: Deployment) -> Iterator[Violation]:
    for name in deployment.quantized:
        activation = deployment.schemes[name].activation
        if activation is not None and activation.static:
            rule = "inputs must be left alone, or rounded with scales that are taken at run time"
            yield Violation(name, rule, deployment.schemes[name].name)


def _exact_scales(deployment: Deployment) -> Iterator[Violation]:
    held = HELD_SCALES.get(_own_type(deployment))
    if held is None:
        return
    for name in deployment.quantized:
        fmt = deployment.schemes[name].weight
        if isinstance(fmt, IntegerFormat) and fmt.scale_type not in held and _packs(deployment, name):
            rule = f"scales are loaded in the model's type, so they must be {' or '.join(held)}"
            yield Violation(name, rule, deployment.schemes[name].name)


def _own_type(deployment: Deployment) -> str:
    """The type that the configuration gives the model's weights."""
    config = deployment.model.config
    return str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")


def _packs(deployment: Deployment, name: str) -> bool:
    return tensor_format(deployment.quantized[name]) == "pack-quantized"


def layout(source: Source, deployment: Deployment) -> Layout:
    """The source's files with packed tensors and a `quantization_config`."""
    return _repacked(source, deployment).layout


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Pack one planned tensor at a time; all others are copied."""
    from quant.adjusted import Adjusted
    from quant.apply import encode_weight
    from quant.checkpoints.tensors import each_joined

    def stored_as(weight: Tensor, name: str) -> Any:
        made = encode_weight(weight, deployment.plan.layers[name].op, name, deployment.schemes[name], inputs)
        assert not isinstance(made, Adjusted), "the linter refuses quantizers that store more"
        return made

    @lru_cache(maxsize=2)
    def experts(parameter: str, name: str) -> dict[str, Encoded]:
        parts = [item for item in source.stored(deployment.plan) if item.part_of == parameter]
        (_, weight), *_ = each_joined(source, parts)
        return _apart(stored_as(weight, name), parameter, deployment.plan.layers[name].shape, source)

    def encode(item: StoredTensor, weight: Tensor) -> dict[str, Tensor]:
        if item.part_of is None:
            stored = stored_as(weight, item.layer)
        else:
            stored = experts(item.part_of, item.layer)[item.tensor]
        filled = compressed.tensors(stored, packed=_packs(deployment, item.layer))
        return {f"{_key(item)}.{name}": tensor for name, tensor in filled.items()}

    _repacked(source, deployment).write(out, encode, wrote)


def _key(item: StoredTensor) -> str:
    return item.tensor.removesuffix(".weight")


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
    """Every tensor of a written folder that is the model's: its name there, the planned layer whose weight it
    is, values.

    Packed ones are decompressed to float32; one is in memory at a time.
    """
    from quant.checkpoints.tensors import reading

    names = source.entries
    packed = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
    parts: dict[str, list[str]] = {key: [] for key in packed}
    for name in names:
        key, _, part = name.rpartition(".")
        if key in packed and "weight" in part:
            parts[key].append(part)
    places = _places(source, plan)
    layers = {tensor.removesuffix(".weight"): layer for tensor, (layer, _) in places.holders.items()}
    schemes, scales = _schemes(source, plan), _cache_scales(plan, places)
    with reading(source) as read:
        for name in names:
            key, _, part = name.rpartition(".")
            if name in scales:
                continue
            if key not in packed or not part.startswith("weight"):
                yield name, layers.get(key) if part == "weight" else None, read(name)
            elif name.endswith(SCALE):
                state = {part: read(f"{key}.{part}") for part in parts[key]}
                yield f"{key}.weight", layers[key], _decompressed(state, schemes[layers[key]])


def _decompressed(state: dict[str, Tensor], scheme: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    if state["weight_scale"].dtype.itemsize > 1:
        state["weight_scale"] = state["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    weight: Tensor = compressor.decompress(state, scheme)["weight"]
    return weight.float()


def _places(source: Source, plan: Plan) -> Places:
    """Of a written folder, in which the parts of a packed weight stand for it."""
    names = list(dict.fromkeys(PART.sub(".weight", name) for name in source.entries))
    return Places.of(plan, names, lambda: Joined.of(source.folder, names))


def _schemes(source: Source, plan: Plan) -> dict[str, Any]:
    """Layer -> the scheme that the library's parser reads for it."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(source.config["quantization_config"])
    named = {name: group for group in config.config_groups.values() for name in group.targets}
    found = {}
    for layer, decision in plan.layers.items():
        for path in (layer, *decision.aliases):
            part = linears(path, decision.op, source.config)[0]
            if part in named:
                found[layer] = named[part]
    return found


def _repacked(source: Source, deployment: Deployment) -> Repacked:
    def slots(item: StoredTensor) -> Slots | None:
        if item.layer not in deployment.quantized:
            return None
        fmt, matrix = deployment.schemes[item.layer].weight, deployment.plan.layers[item.layer].matrix
        if deployment.plan.layers[item.layer].op in EXPERT_OPS:
            matrix = _expert_matrix(item)
        found = compressed.slots(fmt, matrix, packed=_packs(deployment, item.layer))
        return {f"{_key(item)}.{name}": slot for name, slot in found.items()}

    config = vllm.files(deployment)[vllm.FILE]
    return repack(source, source.stored(deployment.plan), slots, config, _ones(source, deployment))


def _ones(source: Source, deployment: Deployment) -> Slots:
    """Scales of 1 for keys and values, which caches were measured with; transformers leaves missing ones to
    chance.
    """
    if deployment.cache is None:
        return {}
    dtype, one = ONES.get(_own_type(deployment), ONES["float32"])
    names = _cache_scales(deployment.plan, source.places(deployment.plan))
    return {name: Slot(dtype, (1,), content=one) for name in names}


def _cache_scales(plan: Plan, places: Places) -> list[str]:
    """Names of the scales of all caches, spelled as the weights are."""
    return [f"{places.rename(name)}.{part}" for name in plan.kv_cache or {} for part in CACHE_SCALES]


def _expert_matrix(item: StoredTensor) -> Matrix:
    if len(item.entry.shape) != 2:
        raise CheckpointError(
            f"Experts must be stored apart to be packed. Got {item.tensor!r} of shape {item.entry.shape}."
            " Save the model again with save_pretrained()."
        )
    rows, columns = item.entry.shape
    return rows, columns


def _apart(encoded: Encoded, parameter: str, shape: tuple[int, ...], source: Source) -> dict[str, Encoded]:
    """Stored tensor -> what of the fused experts' integers and scales is its own."""
    experts, rows, columns = shape
    values = source.joined.apart(parameter, encoded.values.reshape(experts, rows, columns))
    scales = source.joined.apart(parameter, encoded.scales.reshape(experts, rows, -1))
    groups = encoded.values.shape[1:]
    return {
        name: replace(
            encoded,
            values=part.reshape(-1, *groups),
            scales=scales[name],
            matrix=(part.shape[0], part.shape[1]),
        )
        for name, part in values.items()
    }
