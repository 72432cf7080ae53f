"""AutoRound: `layer_config.json` for its quantizer, and `config.json` for its loader.

Both name every module with all its settings, so that none falls to a default. AutoRound tunes the rounding
itself, so its weights are not those that were measured.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from quant.export.gptq_layout import grain, group_size, layout_bytes, whole_words
from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts
from quant.export.rules import CHANNEL, Takes, only_formats, only_ops

LAYER_FILE = "layer_config.json"
FILE = "config.json"
WIDTHS = range(2, 9)
SIZES = (CHANNEL, 16, 32, 64, 128, 256, 512, 1024)
TAKES = (Takes("int", symmetric=WIDTHS, asymmetric=range(2, 8), scales=SIZES),)
"""The quantizer refuses 8 bits with zero points, which no kernel of its formats runs."""
OPS = ("linear", "transformers_conv1d")
ALONE = {"bits": 16, "data_type": "fp"}


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the rules of AutoRound's integer kernels."""
    return (
        *only_ops(deployment, OPS),
        *only_formats(deployment, *TAKES),
        *whole_words(deployment),
    )


def files(deployment: Deployment) -> dict[str, bytes]:
    """The quantizer's `layer_config`, which may name only what it could quantize, and the model's own
    configuration with the plan in it.
    """
    config = {**deployment.model.config, "quantization_config": quantization_config(deployment)}
    ops = {module.name: module.op for module in deployment.model.modules}
    known = {name: entry for name, entry in layer_config(deployment).items() if ops.get(name, OPS[0]) in OPS}
    return {LAYER_FILE: _json(known), FILE: _json(config)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def layer_config(deployment: Deployment) -> dict[str, dict[str, Any]]:
    """Module path -> settings, 16 bits for those that keep their precision."""
    planned = {name: _settings(facts) for name, facts in deployment.quantized.items()}
    return {**planned, **{name: dict(ALONE) for name in deployment.kept_names}}


def quantization_config(deployment: Deployment) -> dict[str, Any]:
    """The value of `quantization_config`. Without asymmetric modules, zero points are packed as GPTQ does."""
    facts = deployment.quantized.values()
    most = Counter(facts).most_common(1)[0][0]
    symmetric = all(found.symmetric for found in facts)
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round",
        **_settings(most),
        "extra_config": layer_config(deployment),
    }


def _settings(facts: WeightFacts) -> dict[str, Any]:
    return {
        "bits": facts.bits,
        "group_size": group_size(facts),
        "sym": facts.symmetric,
        "data_type": "int",
        "act_bits": 16,
    }


def stored_bytes(deployment: Deployment) -> int:
    """Packed values and zero points, and float16 scales."""
    layers = deployment.quantized_layers.items()
    return deployment.kept_bytes + sum(
        layout_bytes(deployment.quantized[name], layer.matrix) for name, layer in layers
    )


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """What AutoRound's quantizer and its loader give every module, if they agree."""
    from auto_round.inference.convert_model import get_layer_config
    from transformers import AutoRoundConfig

    from quant.export.skeleton import build_skeleton

    skeleton = build_skeleton(model)
    config = AutoRoundConfig.from_dict(json.loads(exported[FILE])["quantization_config"])
    tuned = _tuned(skeleton, json.loads(exported[LAYER_FILE]))
    loaded = {name: vars(scheme) for name, scheme in get_layer_config(skeleton, config).items()}
    found = {module.name: _facts(loaded.get(model.linears[module.name][0])) for module in model.modules}
    differing = [
        module.name for module in model.modules if _facts(tuned.get(module.name)) != found[module.name]
    ]
    if differing:
        raise ValueError(f"{LAYER_FILE} and {FILE} must agree. Got {differing[0]} otherwise. Export again.")
    return found


def _tuned(skeleton: Any, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Module path -> settings, as the quantizer completes them."""
    from auto_round.compressors.config_resolution import resolve_scheme_value
    from auto_round.compressors.layer_config_resolver import resolve_layer_config

    found = resolve_layer_config(
        model=skeleton, scheme=resolve_scheme_value("W4A16", {}), layer_config=given, quant_block_list=[]
    )
    return {name: dict(settings) for name, settings in found.items()}


def _facts(scheme: Any) -> WeightFacts | None:
    """The facts of settings; None for those that leave a module alone."""
    from auto_round.utils import check_to_quantized

    if scheme is None or not check_to_quantized(scheme):
        return None
    return WeightFacts(str(scheme["data_type"]), scheme["bits"], scheme["sym"], *grain(scheme["group_size"]))
