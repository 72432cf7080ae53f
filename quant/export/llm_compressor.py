"""LLM Compressor: a recipe that quantizes a model as planned and saves it for vLLM.

Each quantizer becomes the modifier that does the same; the widths and groups are those that vLLM runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from quant.export import vllm
from quant.export.compressed_config import config_groups, packed_bytes, read_config
from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts

FILE = "recipe.yaml"
MODIFIERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rtn": ("QuantizationModifier", "minmax", {}),
    "mse_clip": ("QuantizationModifier", "mse", {}),
    "gptq": ("GPTQModifier", "mse", {"block_size": 128, "dampening_frac": 0.01, "actorder": "weight"}),
}
"""Quantizer -> modifier, the observer that chooses scales in the same way, and the modifier's settings."""


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """vLLM's rules, and a modifier for the plan's quantizer: one for the whole recipe."""
    return (*vllm.lint(deployment), *_quantizers(deployment))


def _quantizers(deployment: Deployment) -> Iterator[Violation]:
    schemes = {name: deployment.schemes[name] for name in deployment.quantized}
    first = next((scheme.quantizer for scheme in schemes.values()), None)
    for name, scheme in schemes.items():
        if scheme.quantizer not in MODIFIERS:
            rule = f"the quantizer must be one of {', '.join(MODIFIERS)}"
            yield Violation(name, rule, scheme.quantizer)
        elif scheme.quantizer != first:
            yield Violation(name, f"all layers must use one quantizer, {first}", scheme.quantizer)


def files(deployment: Deployment) -> dict[str, bytes]:
    """The recipe, with every quantizable module in a group or in `ignore`."""
    first = next(iter(deployment.quantized))
    name, observer, settings = MODIFIERS[deployment.schemes[first].quantizer]
    groups = config_groups(deployment)
    for group in groups.values():
        group["weights"]["observer"] = observer
    ignore = [module.name for module in deployment.untouched]
    modifier = {"ignore": ignore, "config_groups": groups, **settings}
    recipe = {"quant_stage": {"quant_modifiers": {name: modifier}}}
    return {FILE: yaml.safe_dump(recipe, sort_keys=False).encode()}


def stored_bytes(deployment: Deployment) -> int:
    """Bytes of the packed tensors that the recipe's model will have."""
    return packed_bytes(deployment)


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """The modifier's groups through compressed-tensors, which is what LLM Compressor parses them with."""
    recipe: dict[str, Any] = yaml.safe_load(exported[FILE])
    (modifier,) = recipe["quant_stage"]["quant_modifiers"].values()
    groups = {key: modifier[key] for key in ("config_groups", "ignore")}
    return read_config(groups, model)
