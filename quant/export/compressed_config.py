"""The configuration of compressed-tensors, which several consumers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.export.protocol import Deployment, ModelFacts, WeightFacts
from quant.integer import IntegerFormat

SHAPE_BYTES = 16
"""Two 64-bit integers beside every packed weight: its shape."""


def config_groups(deployment: Deployment) -> dict[str, dict[str, Any]]:
    """`group_<i>` -> scheme with every module of it by name; numbered by first appearance.

    vLLM finds groups by these exact names: a suffix makes it load other schemes.
    """
    members: dict[WeightFacts, list[str]] = {}
    for name, facts in deployment.quantized.items():
        members.setdefault(facts, []).append(name)
    return {f"group_{n}": _group(facts, names) for n, (facts, names) in enumerate(members.items())}


def _group(facts: WeightFacts, names: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": facts.bits,
        "type": "int",
        "symmetric": facts.symmetric,
        "strategy": facts.granularity,
        "group_size": facts.group_size,
        "dynamic": False,
    }
    return {
        "targets": names,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def quantization_config(deployment: Deployment) -> dict[str, Any]:
    """The value of `quantization_config`: every quantizable module is in a group or in `ignore`."""
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": config_groups(deployment),
        "ignore": [module.name for module in deployment.untouched],
        "kv_cache_scheme": None,
    }


def packed_bytes(deployment: Deployment) -> int:
    """Bytes of the packed tensors: 32-bit words per output channel, scales, packed zero points, shapes."""
    stored = deployment.kept_bytes
    for name, layer in deployment.quantized_layers.items():
        fmt = deployment.schemes[name].weight
        assert isinstance(fmt, IntegerFormat), "the linter refuses such plans"
        rows, columns = layer.matrix
        scales = fmt.scales_shape(layer.matrix)
        words = rows * -(-columns * fmt.bits // 32)
        points = 0 if fmt.symmetric else -(-rows * fmt.bits // 32) * scales[1]
        scale_bytes = fmt.storage(layer.matrix).scale_bits // 8
        stored += 4 * (words + points) + scale_bytes + SHAPE_BYTES
    return stored


def read_config(config: Mapping[str, Any], model: ModelFacts) -> dict[str, WeightFacts | None]:
    """What compressed-tensors attaches to every module: its own parser and its own name matching."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    from quant.export.skeleton import build_skeleton

    skeleton = build_skeleton(model)
    apply_quantization_config(skeleton, QuantizationConfig.model_validate(dict(config)), show_progress=False)
    return {module.name: _attached(skeleton.get_submodule(module.name)) for module in model.modules}


def _attached(module: Any) -> WeightFacts | None:
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None or scheme.weights is None:
        return None
    weights = scheme.weights
    return WeightFacts("int", weights.num_bits, weights.symmetric, str(weights.strategy), weights.group_size)
