"""torchao through transformers: `config.json` with a `quantization_config` that names every module.

The configuration is built with torchao's own `config_to_dict`. Integers per output channel or group become
`IntxWeightOnlyConfig`, symmetric 8-bit ones per channel `Int8WeightOnlyConfig` (with inputs rounded token by
token `Int8DynamicActivationInt8WeightConfig`), FP8 weights `Float8WeightOnlyConfig`; modules that keep their
precision are named with `None`. torchao stores one byte per weight at every width.
"""

from __future__ import annotations

import json
from typing import Any

from quant.export.protocol import Deployment, Files, ModelFacts, Module, Violation, WeightFacts
from quant.export.rules import Takes, only_formats, only_ops
from quant.integer import IntegerFormat

FILE = "config.json"
OPS = ("linear", "embedding")
TAKES = (
    Takes("int", symmetric=range(2, 9), asymmetric=range(2, 9), scales=("channel", "group")),
    Takes("int", symmetric=(8,), scales=("channel",), activations=("int8",)),
    Takes("fp8_e4m3", scales=("channel", "tensor")),
)


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the rules of these configurations."""
    floats = (
        Violation(name, "FP8 is for linear modules", f"an {deployment.layers[name].op} module")
        for name, facts in deployment.quantized.items()
        if facts.kind == "fp8_e4m3" and deployment.layers[name].op == "embedding"
    )
    return (*only_ops(deployment, OPS), *only_formats(deployment, *TAKES), *floats, *_tied(deployment))


def _tied(deployment: Deployment) -> list[Violation]:
    """transformers ties weights again after loading, which a quantized weight does not survive."""
    rule = "weights that several modules share keep their precision"
    return [
        Violation(name, rule, f"{layer.scheme}, shared with {', '.join(layer.aliases)}")
        for name, layer in deployment.quantized_layers.items()
        if layer.aliases
    ]


def files(deployment: Deployment) -> dict[str, bytes]:
    """The model's own configuration with the plan in it. Needs torchao."""
    config = {**deployment.model.config, "quantization_config": quantization_config(deployment)}
    return {FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def quantization_config(deployment: Deployment) -> dict[str, Any]:
    """The value of `quantization_config`, as `transformers.TorchAoConfig` writes it.

    `modules_to_not_convert` is empty so that transformers adds no exceptions of its own (it leaves heads
    alone unless told what to leave alone).
    """
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig

    configs = {name: _config(deployment, name) for name in deployment.quantized}
    kept = {module.name: None for module in deployment.untouched if module.op in OPS}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(FqnToConfig({**configs, **kept}))},
        "modules_to_not_convert": [],
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _config(deployment: Deployment, name: str) -> Any:
    """torchao's configuration of one module; none of them may change settings of the process."""
    import torch
    from torchao import quantization as ao

    facts, op = deployment.quantized[name], deployment.layers[name].op
    if facts.kind == "fp8_e4m3":
        grain = ao.PerRow() if facts.granularity == "channel" else ao.PerTensor()
        return ao.Float8WeightOnlyConfig(granularity=grain, set_inductor_config=False)
    if facts.activation is not None:
        return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if stores_float32_scales(facts, op):
        return ao.Int8WeightOnlyConfig(set_inductor_config=False)
    fmt = deployment.schemes[name].weight
    assert isinstance(fmt, IntegerFormat), "the linter refuses such plans"
    kinds = ao.MappingType
    return ao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{facts.bits}"),
        granularity=ao.PerAxis(0) if facts.group_size is None else ao.PerGroup(facts.group_size),
        mapping_type=kinds.SYMMETRIC if facts.symmetric else kinds.ASYMMETRIC,
        scale_dtype=getattr(torch, fmt.scale_type),
    )


def stores_float32_scales(facts: WeightFacts, op: str) -> bool:
    """Whether a module becomes an `Int8Tensor`, whose scales are float32."""
    return (facts.bits, facts.symmetric, facts.granularity, op) == (8, True, "channel", "linear")


def stored_bytes(deployment: Deployment) -> int:
    """One byte per weight; for integers also a scale and a zero point of one byte each, for FP8 a scale."""
    stored = deployment.kept_bytes
    for name, layer in deployment.quantized_layers.items():
        facts, fmt = deployment.quantized[name], deployment.schemes[name].weight
        rows, columns = layer.matrix
        if isinstance(fmt, IntegerFormat):
            scales = rows * columns // (facts.group_size or columns)
            wide = 4 if stores_float32_scales(facts, layer.op) else SCALE_BYTES[fmt.scale_type]
            stored += layer.parameters + scales * (wide + 1)
        else:
            stored += layer.parameters + 4 * (rows if facts.granularity == "channel" else 1)
    return stored


SCALE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """What `TorchAoConfig` and `torchao.quantize_` make of stand-ins for the modules."""
    from torchao.quantization import quantize_
    from transformers import TorchAoConfig

    config = json.loads(exported[FILE])["quantization_config"]
    parsed = TorchAoConfig.from_dict({key: config[key] for key in config if key != "quant_method"})
    found: dict[str, WeightFacts | None] = {}
    for start in range(0, len(model.modules), 64):
        part = model.modules[start : start + 64]
        skeleton = _stand_ins(part)
        quantize_(skeleton, parsed.quant_type, filter_fn=None)
        found |= {module.name: _facts(skeleton.get_submodule(module.name)) for module in part}
    return found


def _stand_ins(modules: tuple[Module, ...]) -> Any:
    """Small positive weights: a symmetric mapping gives zero points of 0, an asymmetric one other ones."""
    import torch

    from quant.export.skeleton import build_skeleton

    skeleton = build_skeleton(ModelFacts({}, modules), rows=8)
    skeleton.to_empty(device="cpu")
    for parameter in skeleton.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    return skeleton


def _facts(module: Any) -> WeightFacts | None:
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind in ("Parameter", "NoneType"):
        return None
    size = weight.block_size[-1]
    whole = size == weight.shape[-1]
    if kind == "Float8Tensor":
        return WeightFacts("fp8_e4m3", 8, True, "tensor" if weight.block_size[0] > 1 else "channel", None)
    bits = 8 if kind == "Int8Tensor" else int(str(weight.target_dtype).removeprefix("torch.int"))
    symmetric = not bool(weight.zero_point.any())
    activation = "int8" if getattr(weight, "act_quant_kwargs", None) is not None else None
    grain = "channel" if whole else "group"
    return WeightFacts("int", bits, symmetric, grain, None if whole else size, activation)
