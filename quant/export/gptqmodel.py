"""GPT-QModel: `quantize_config.json`, and the same as `quantization_config` of `config.json`.

Every module has a rule of its own under `dynamic`, an anchored and escaped regular expression: `+:` with its
settings, `-:` to be left alone. Rules that leave alone are tried first, then the others, and the first match
wins; as no two expressions match one name, the order says nothing. Symmetric plans have the format `gptq`,
plans with zero points `gptq_v2` (the first version stores them less one, which 0 does not survive), plans
with 5, 6 or 7 bits `gptq_p`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from quant.export.gptq_layout import grain, group_size, layout_bytes, whole_words
from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts
from quant.export.rules import CHANNEL, Takes, fused_agree, only_formats, only_ops

FILE = "quantize_config.json"
HEAD = "lm_head"
PLANAR = (5, 6, 7)
WIDTHS = range(2, 9)
SIZES = (CHANNEL, 16, 32, 64, 128, 256, 512, 1024)
TAKES = (Takes("int", symmetric=WIDTHS, asymmetric=WIDTHS, scales=SIZES),)


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of GPT-QModel's rules, and of the one that vLLM adds when it loads such checkpoints."""
    return (
        *only_ops(deployment, ("linear",)),
        *only_formats(deployment, *TAKES),
        *whole_words(deployment),
        *_in_blocks(deployment),
        *fused_agree(deployment),
    )


def _in_blocks(deployment: Deployment) -> Iterator[Violation]:
    for name, layer in deployment.layers.items():
        inside = any(part.isdigit() for part in name.split("."))
        if name in deployment.quantized and not inside and name != HEAD:
            rule = f"only modules of the model's repeated blocks and {HEAD} can be quantized"
            yield Violation(name, rule, layer.scheme)


def files(deployment: Deployment) -> dict[str, bytes]:
    """The settings twice: for GPT-QModel, and in the model's own configuration for transformers and vLLM."""
    settings = quantize_config(deployment)
    config = {**deployment.model.config, "quantization_config": settings}
    return {FILE: _json(settings), "config.json": _json(config)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def quantize_config(deployment: Deployment) -> dict[str, Any]:
    """The most frequent settings as the default, and a rule for every module."""
    facts = deployment.quantized
    most = Counter(facts.values()).most_common(1)[0][0]
    layout = _format(facts.values())
    return {
        **_settings(most),
        "desc_act": False,
        "lm_head": HEAD in facts,
        "quant_method": "gptq",
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "dynamic": {
            **{f"-:{_pattern(name)}": {} for name in deployment.kept_names},
            **{f"+:{_pattern(name)}": _settings(found) for name, found in facts.items()},
        },
    }


def _settings(facts: WeightFacts) -> dict[str, Any]:
    return {"bits": facts.bits, "group_size": group_size(facts), "sym": facts.symmetric}


def _pattern(name: str) -> str:
    """Matches this name alone."""
    return f"^{re.escape(name)}$"


def _format(facts: Any) -> str:
    if any(found.bits in PLANAR for found in facts):
        return "gptq_p"
    return "gptq" if all(found.symmetric for found in facts) else "gptq_v2"


def stored_bytes(deployment: Deployment) -> int:
    """Packed values and zero points, float16 scales, and for every column the number of its group."""
    layers = deployment.quantized_layers
    packed = sum(layout_bytes(deployment.quantized[name], layer.matrix) for name, layer in layers.items())
    return deployment.kept_bytes + packed + sum(4 * layer.matrix[1] for layer in layers.values())


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """What GPT-QModel's configuration class gives for every module, from both files."""
    from gptqmodel.quantization import QuantizeConfig

    settings = json.loads(exported[FILE])
    if json.loads(exported["config.json"])["quantization_config"] != settings:
        raise ValueError(f"{FILE} and config.json must agree. Export again.")
    config = QuantizeConfig.from_quant_config(settings)
    if config.format != settings["format"]:
        raise ValueError(f"Format must be {config.format}. Got {settings['format']}. Export again.")
    found = {
        module.name: [_facts(config, name) for name in model.linears[module.name]] for module in model.modules
    }
    return {
        name: next((facts for facts in given if facts is not None), None) for name, given in found.items()
    }


def _facts(config: Any, name: str) -> WeightFacts | None:
    if config.dynamic_get(name) is False or (name == HEAD and not config.lm_head):
        return None
    bits, size, symmetric = (
        config.dynamic_get(name, key, getattr(config, key)) for key in ("bits", "group_size", "sym")
    )
    return WeightFacts("int", bits, symmetric, *grain(size))
