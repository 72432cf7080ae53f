"""Model Optimizer: `hf_quant_config.json` of mixed precision, read by TensorRT-LLM, vLLM and SGLang."""

from __future__ import annotations

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts
from quant.export.rules import CHANNEL, TENSOR, Takes, fused_agree, only_formats, only_ops

FILE = "hf_quant_config.json"
ALGORITHMS = {
    "FP8": WeightFacts("fp8_e4m3", 8, True, TENSOR, None, "fp8s"),
    "FP8_PER_CHANNEL_PER_TOKEN": WeightFacts("fp8_e4m3", 8, True, CHANNEL, None, "fp8"),
    "NVFP4": WeightFacts("nvfp4", 4, True, "group", 16, "nvfp4s"),
    "W4A16_NVFP4": WeightFacts("nvfp4", 4, True, "group", 16),
    "MXFP8": WeightFacts("mxfp8", 8, True, "group", 32, "mxfp8"),
    "W8A16": WeightFacts("int", 8, True, CHANNEL, None),
}
"""What each algorithm stores, as Model Optimizer's exporter writes it."""
CACHES = {"fp8_e4m3": "FP8"}
"""Without scales in the checkpoint they are 1, as measured."""
AWQ, AWQ_SIZES = "W4A16_AWQ", (64, 128)
TAKES = (
    Takes("int", symmetric=(8,), scales=(CHANNEL,)),
    Takes("int", symmetric=(4,), scales=AWQ_SIZES),
    Takes("fp8_e4m3", scales=(TENSOR,), activations=("fp8s",)),
    Takes("fp8_e4m3", scales=(CHANNEL,), activations=("fp8",)),
    Takes("nvfp4", activations=(None, "nvfp4s")),
    Takes("mxfp8", activations=("mxfp8",)),
)


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the rules: an algorithm for each scheme, and one for matrices loaded as one."""
    return (
        *only_ops(deployment, ("linear",)),
        *only_formats(deployment, *TAKES),
        *fused_agree(deployment),
    )


def files(deployment: Deployment) -> dict[str, bytes]:
    """The algorithm of every planned module; all others are excluded by name."""
    quantization = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None if deployment.cache is None else CACHES[deployment.cache],
        "exclude_modules": deployment.kept_names,
        "quantized_layers": {name: _entry(facts) for name, facts in deployment.quantized.items()},
    }
    config = {"producer": {"name": "bitplan"}, "quantization": quantization}
    return {FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _entry(facts: WeightFacts) -> dict[str, Any]:
    if facts.kind == "int" and facts.group_size is not None:
        # The checkpoint's smoothing factors are 1 unless a quantizer chooses others.
        more = {"has_zero_point": False, "pre_quant_scale": True}
        return {"quant_algo": AWQ, "group_size": facts.group_size, **more}
    name = next(name for name, known in ALGORITHMS.items() if known == facts)
    return {"quant_algo": name} | ({"group_size": facts.group_size} if facts.group_size else {})


def stored_bytes(deployment: Deployment) -> int:
    """What the schemes store; W4A16_AWQ has a float16 smoothing factor per column besides."""
    stored = deployment.kept_bytes
    for name, layer in deployment.quantized_layers.items():
        facts = deployment.quantized[name]
        smoothing = 2 * layer.matrix[1] if _entry(facts)["quant_algo"] == AWQ else 0
        stored += layer.bytes + smoothing
    return stored


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """The groups that Model Optimizer's converter makes, module by module."""
    converted = _converter()(json.loads(exported[FILE]))
    found: dict[str, WeightFacts | None] = {module.name: None for module in model.modules}
    for group in converted["config_groups"].values():
        for name in group["targets"]:
            found[name] = _facts(converted["quantized_layers"][name], group["weights"])
    twice = [name for name in converted["ignore"] if found.get(name) is not None]
    if twice:
        raise ValueError(f"Modules must be quantized or excluded. Got {twice[0]} as both. Export again.")
    return found


def _facts(entry: dict[str, Any], weights: dict[str, Any]) -> WeightFacts:
    """The algorithm's facts, which must be of the width and group size that the converter gives."""
    algorithm = entry["quant_algo"]
    size = weights.get("group_size")
    facts = WeightFacts("int", 4, True, "group", size) if algorithm == AWQ else ALGORITHMS[algorithm]
    if (facts.bits, facts.group_size) != (weights["num_bits"], size):
        raise ValueError(f"{algorithm} must have {facts.bits} bits. Got {weights}. Export again.")
    return facts


def _converter() -> Any:
    """`convert_hf_quant_config_format` from its own file: the package around it needs seconds to load."""
    package = find_spec("modelopt")
    if package is None or not package.submodule_search_locations:
        raise ImportError("nvidia-modelopt must be installed to read its files. Install nvidia-modelopt.")
    path = Path(package.submodule_search_locations[0]) / "torch" / "export" / "convert_hf_config.py"
    spec = spec_from_file_location("_bitplan_modelopt_converter", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.convert_hf_quant_config_format
