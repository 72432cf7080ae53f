"""The configuration of compressed-tensors, which several consumers read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quant.export.protocol import Deployment, ModelFacts, Module, WeightFacts
from quant.integer import IntegerFormat
from quant.plan import PlanLayer

SHAPE_BYTES = 16
"""Two 64-bit integers beside every packed weight: its shape."""
FORMATS = {
    "fp8_e4m3": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
SCALES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8", "mxfp8": "torch.uint8"}


def _inputs(bits: int, kind: str, strategy: str, dynamic: bool | str, **more: Any) -> dict[str, Any]:
    shape = {"strategy": strategy, "group_size": None, "dynamic": dynamic}
    return {"num_bits": bits, "type": kind, "symmetric": True, **shape, **more}


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "int8": _inputs(8, "int", "token", True),
    "int8s": _inputs(8, "int", "tensor", False),
    "int4": _inputs(4, "int", "token", True),
    "fp8": _inputs(8, "float", "token", True),
    "fp8s": _inputs(8, "float", "tensor", False),
    "mxfp8": _inputs(8, "float", "group", True, group_size=32, scale_dtype="torch.uint8"),
    "nvfp4s": _inputs(4, "float", "tensor_group", "local", group_size=16, scale_dtype="torch.float8_e4m3fn"),
}
"""Activation format -> arguments. nvfp4s stores its float32 scale; its block scales are taken at run time."""


def config_groups(deployment: Deployment) -> dict[str, dict[str, Any]]:
    """`group_<i>` -> scheme with every module of it by name; numbered by first appearance.

    vLLM finds groups by these exact names: a suffix makes it load other schemes.
    """
    members: dict[WeightFacts, list[str]] = {}
    for name, facts in deployment.quantized.items():
        members.setdefault(facts, []).extend(deployment.model.linears[name])
    return {f"group_{n}": _group(facts, names) for n, (facts, names) in enumerate(members.items())}


def _group(facts: WeightFacts, names: list[str]) -> dict[str, Any]:
    return {
        "targets": names,
        "weights": _weights(facts),
        "input_activations": None if facts.activation is None else dict(ACTIVATIONS[facts.activation]),
        "output_activations": None,
        "format": tensor_format(facts),
    }


def tensor_format(facts: WeightFacts) -> str:
    """The library's name of the layout of a module's tensors."""
    if facts.kind in FORMATS:
        return FORMATS[facts.kind]
    whole = facts.bits == 8 and facts.group_size is None
    return "int-quantized" if facts.activation is not None and whole else "pack-quantized"


def _weights(facts: WeightFacts) -> dict[str, Any]:
    found = {
        "num_bits": facts.bits,
        "type": "int" if facts.kind == "int" else "float",
        "symmetric": facts.symmetric,
        "strategy": "tensor_group" if facts.kind == "nvfp4" else facts.granularity,
        "group_size": facts.group_size,
        "dynamic": False,
    }
    return found | ({"scale_dtype": SCALES[facts.kind]} if facts.kind in SCALES else {})


CACHES = {
    "fp8_e4m3": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
}
"""Without scales in the checkpoint they are 1, as measured."""


def quantization_config(deployment: Deployment) -> dict[str, Any]:
    """The value of `quantization_config`: every quantizable module is in a group or in `ignore`."""
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": config_groups(deployment),
        "ignore": ignored(deployment),
        "kv_cache_scheme": None if deployment.cache is None else dict(CACHES[deployment.cache]),
    }


def ignored(deployment: Deployment) -> list[str]:
    """Every module that keeps its precision."""
    return deployment.kept_names


def packed_bytes(deployment: Deployment) -> int:
    """Bytes of the tensors of all planned modules, as the library stores them."""
    return deployment.kept_bytes + sum(
        _tensor_bytes(deployment, name, layer) for name, layer in deployment.quantized_layers.items()
    )


def _tensor_bytes(deployment: Deployment, name: str, layer: PlanLayer) -> int:
    """Packed integers are 32-bit words per output channel, packed zero points and a shape beside them."""
    if tensor_format(deployment.quantized[name]) != "pack-quantized":
        return layer.bytes
    fmt = deployment.schemes[name].weight
    assert isinstance(fmt, IntegerFormat), "only integers are packed so"
    rows, columns = layer.matrix
    words = rows * -(-columns * fmt.bits // 32)
    points = 0 if fmt.symmetric else -(-rows * fmt.bits // 32) * fmt.scales_shape(layer.matrix)[1]
    shapes = SHAPE_BYTES * len(deployment.model.linears[name])
    return 4 * (words + points) + fmt.storage(layer.matrix).scale_bits // 8 + shapes


def read_config(config: Mapping[str, Any], model: ModelFacts) -> dict[str, WeightFacts | None]:
    """What compressed-tensors attaches to every module: its own parser and its own name matching."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    from quant.export.skeleton import build_skeleton

    skeleton = build_skeleton(ModelFacts(model.config, tuple(_apart(model))))
    apply_quantization_config(skeleton, QuantizationConfig.model_validate(dict(config)), show_progress=False)
    return {
        name: _agreed([_attached(skeleton.get_submodule(part)) for part in parts])
        for name, parts in model.linears.items()
    }


def _apart(model: ModelFacts) -> Iterator[Module]:
    for module in model.modules:
        parts = model.linears[module.name]
        yield from [module] if parts == (module.name,) else (Module(part, "linear") for part in parts)


def _agreed(found: list[WeightFacts | None]) -> WeightFacts | None:
    """What all experts of a projection were given."""
    if len(set(found)) > 1:
        raise ValueError(f"Experts of a block must have one scheme. Got {found[:2]}, .... Export again.")
    return found[0]


def _attached(module: Any) -> WeightFacts | None:
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None or scheme.weights is None:
        return None
    weights = scheme.weights
    grain = "group" if weights.strategy == "tensor_group" else str(weights.strategy)
    inputs = None if scheme.input_activations is None else _activation_of(scheme.input_activations)
    facts = WeightFacts(
        _kind_of(weights), weights.num_bits, weights.symmetric, grain, weights.group_size, inputs
    )
    if str(scheme.format) != tensor_format(facts):
        raise ValueError(
            f"Format must be {tensor_format(facts)} for {facts}. Got {scheme.format}. Export again."
        )
    return facts


def _kind_of(weights: Any) -> str:
    if weights.type == "int":
        return "int"
    grain = (weights.num_bits, str(weights.strategy), weights.group_size)
    kinds = {(4, "tensor_group", 16): "nvfp4", (4, "group", 32): "mxfp4", (8, "group", 32): "mxfp8"}
    return kinds.get(grain, f"fp{weights.num_bits}_e4m3")


def _activation_of(inputs: Any) -> str:
    found = {
        name: getattr(inputs, name) for name in ("num_bits", "type", "strategy", "dynamic", "group_size")
    }
    for name, arguments in ACTIVATIONS.items():
        if all(arguments[key] == value for key, value in found.items()):
            return name
    raise ValueError(f"Input activations must be of a known format. Got {found}. Export again.")
