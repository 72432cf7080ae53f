"""vLLM, and transformers with compressed-tensors: weights as compressed-tensors stores them.

Each module's tensors are those of its format (`quant/checkpoints/compressed.py`); `config.json` says which
format that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoints import compressed
from quant.checkpoints.protocol import Layout, Wrote
from quant.checkpoints.shards import Repacked, Slots, repack
from quant.checkpoints.source import Source, StoredTensor, renaming
from quant.export import front, vllm
from quant.export.compressed_config import tensor_format
from quant.export.protocol import Deployment, Violation
from quant.export.rules import only_ops
from quant.integer import IntegerFormat
from quant.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf

SCALE = ".weight_scale"
EXACT = {
    "float16": ("float16",),
    "bfloat16": ("bfloat16",),
    "float32": ("float16", "bfloat16", "float32"),
}
"""Type of the model's weights, which scales of packed integers are loaded in -> types of scales that it holds
exactly."""


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Violations of vLLM's rules, and of what this checkpoint can hold."""
    return (
        *only_ops(deployment, ("linear",)),
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
    config = deployment.model.config
    own = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    exact = EXACT.get(own, EXACT["float32"])
    for name in deployment.quantized:
        fmt = deployment.schemes[name].weight
        if isinstance(fmt, IntegerFormat) and fmt.scale_type not in exact and _packs(deployment, name):
            rule = f"scales are loaded in the model's type, so they must be {' or '.join(exact)}"
            yield Violation(name, rule, deployment.schemes[name].name)


def _packs(deployment: Deployment, name: str) -> bool:
    return tensor_format(deployment.quantized[name]) == "pack-quantized"


def layout(source: Source, deployment: Deployment) -> Layout:
    """The source's files with packed tensors and a `quantization_config`."""
    return _repacked(source, deployment).layout


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Pack one planned tensor at a time; all others are copied."""
    from quant.adjusted import Adjusted
    from quant.apply import encode_weight

    def encode(item: StoredTensor, weight: Tensor) -> dict[str, Tensor]:
        layer, scheme = deployment.plan.layers[item.layer], deployment.schemes[item.layer]
        stored = encode_weight(weight, layer.op, item.layer, scheme, inputs)
        assert not isinstance(stored, Adjusted), "the linter refuses quantizers that store more"
        filled = compressed.tensors(stored, packed=_packs(deployment, item.layer))
        return {f"{_key(item)}.{name}": tensor for name, tensor in filled.items()}

    _repacked(source, deployment).write(out, encode, wrote)


def _key(item: StoredTensor) -> str:
    return item.tensor.removesuffix(".weight")


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """Decompressed by the library, with the scheme that its own parser reads for the module."""
    for _, layer, weight in unpacked(Source.open(place), deployment.plan):
        if layer is not None:
            yield layer, weight


def unpacked(source: Source, plan: Plan) -> Iterator[tuple[str, str | None, Tensor]]:
    """Every tensor of a written folder: its name in the model, the planned layer whose weight it is, values.

    Packed ones are decompressed to float32; one is in memory at a time.
    """
    files = {tensor: file for file, header in source.headers.items() for tensor in header.tensors}
    packed = {name.removesuffix(SCALE) for name in files if name.endswith(SCALE)}
    layers = _layers_by_key(plan, files)
    schemes = _schemes(source)
    for name in files:
        key, _, part = name.rpartition(".")
        if key not in packed or not part.startswith("weight"):
            yield name, layers.get(key) if part == "weight" else None, _read(source, files, name)
        elif name.endswith(SCALE):
            parts = [other for other in files if other.rpartition(".")[0] == key and "weight" in other]
            state = {other.removeprefix(f"{key}."): _read(source, files, other) for other in parts}
            yield f"{key}.weight", layers[key], _decompressed(state, schemes[layers[key]])


def _decompressed(state: dict[str, Tensor], scheme: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    if state["weight_scale"].dtype.itemsize > 1:
        state["weight_scale"] = state["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    weight: Tensor = compressor.decompress(state, scheme)["weight"]
    return weight.float()


def _layers_by_key(plan: Plan, tensors: Iterable[str]) -> dict[str, str]:
    """The beginning of a stored tensor's name -> layer."""
    rename = renaming(plan, {name.rpartition(".")[0] for name in tensors})
    return {rename(path): name for name, layer in plan.layers.items() for path in (name, *layer.aliases)}


def _schemes(source: Source) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(source.config["quantization_config"])
    return {name: group for group in config.config_groups.values() for name in group.targets}


def _read(source: Source, files: Mapping[str, str], name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(source.folder / files[name], framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor


def _repacked(source: Source, deployment: Deployment) -> Repacked:
    def slots(item: StoredTensor) -> Slots:
        if item.layer not in deployment.quantized:
            return {}
        fmt, matrix = deployment.schemes[item.layer].weight, deployment.plan.layers[item.layer].matrix
        found = compressed.slots(fmt, matrix, packed=_packs(deployment, item.layer))
        return {f"{_key(item)}.{name}": slot for name, slot in found.items()}

    config = vllm.files(deployment)[vllm.FILE]
    return repack(source, source.stored(deployment.plan), slots, config)
