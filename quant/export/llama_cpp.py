"""llama.cpp: a `--tensor-type-file` for `llama-quantize`, one anchored pattern per tensor.

    llama-quantize --tensor-type-file tensor_types.txt model-bf16.gguf model.gguf q8_0

The last argument must be a quantized type: with a float type llama-quantize reads no patterns. It chooses
scales itself, so its weights differ in rounding from those that were measured; a GGUF checkpoint has the
measured ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from quant.export.gguf_names import BLOCKS, architecture, block_count, gguf_library, tensor_names
from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts
from quant.export.rules import only_ops
from quant.gguf_blocks import GGUF_TYPES
from quant.layers import EXPERT_OPS
from quant.schemes import parse_scheme

FILE = "tensor_types.txt"
OPS = ("linear", "embedding", "transformers_conv1d", *EXPERT_OPS)
FLOATS = {"bf16": "bf16", "fp16": "f16"}
"""Our name of a 16-bit type -> GGML's."""
TYPES = (*GGUF_TYPES, *FLOATS)
KEPT = (
    "_norm.weight",
    "position_embd",
    "token_types",
    "ffn_gate_inp",
    "per_layer_model_proj",
    "altup",
    "laurel",
    "ssm_conv1d",
    "shortconv.conv",
    "attn_rel_b",
    "indexer.",
    "time_mix_",
)
"""Parts of the names of tensors that llama-quantize leaves alone, whatever a pattern says."""


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of what llama-quantize can do."""
    model = tuple(model_faults(deployment))
    return (
        *model,
        *gguf_types(deployment),
        *(() if model else named(deployment)),
        *(() if model else _quantized_tensors(deployment)),
    )


def model_faults(deployment: Deployment) -> Iterator[Violation]:
    """What keeps a whole model from having GGUF names."""
    config = deployment.model.config
    if architecture(config) is None:
        rule = "model_type must be an architecture of the gguf package, such as llama, qwen3 or bert"
        yield Violation("config.json", rule, repr(config.get("model_type")))
    if block_count(config) is None:
        yield Violation("config.json", f"one of {', '.join(BLOCKS)} must be an integer", "none of them")


def gguf_types(deployment: Deployment) -> Iterator[Violation]:
    """Weights must be GGUF types whose blocks fill the rows; llama.cpp would store another one else."""
    yield from only_ops(deployment, OPS)
    for name, facts in deployment.quantized.items():
        layer, weight = deployment.layers[name], deployment.schemes[name].weight
        if facts.kind not in TYPES or facts.activation is not None:
            wide = _as_wide(facts.bits)
            rule = f"weights must be {', '.join(TYPES)} (as wide: {wide}), activations left alone"
            yield Violation(name, rule, layer.scheme)
        elif weight.refuses(layer.matrix):
            rule = f"the columns must be whole blocks of {facts.group_size}"
            yield Violation(name, rule, f"{layer.scheme}: {weight.refuses(layer.matrix)}")


def _as_wide(bits: int) -> str:
    """The types of the least width that is not less."""
    widths = {name: fmt.bits for name, fmt in GGUF_TYPES.items()}
    least = min((width for width in widths.values() if width >= bits), default=8)
    return " or ".join(name for name, width in widths.items() if width == least)


def named(deployment: Deployment) -> Iterator[Violation]:
    """Every quantized module must have a tensor in GGUF."""
    names = tensor_names(deployment.model.config, deployment.quantized)
    for module in deployment.quantized:
        if module not in names:
            kind = architecture(deployment.model.config)
            yield Violation(
                module, f"it must have a tensor in GGUF's table of {kind}, or be excluded", "no name there"
            )


def _quantized_tensors(deployment: Deployment) -> Iterator[Violation]:
    for module, tensors in tensor_names(deployment.model.config, deployment.quantized).items():
        if any(part in tensor for part in KEPT for tensor in tensors):
            yield Violation(module, "llama-quantize leaves this tensor alone", ", ".join(tensors))


def files(deployment: Deployment) -> dict[str, bytes]:
    """One line per tensor of a quantizable module; those that keep their precision name their float type.

    A tied embedding is named as the output too, and joined experts under each of their names: whichever of
    them a GGUF file holds gets the type.
    """
    names = tensor_names(deployment.model.config, [module.name for module in deployment.model.modules])
    own = FLOATS.get(deployment.model.own_type or "", "f32")
    expected = deployment.expected
    types = {
        tensor: _type(expected[module]) or own for module, tensors in names.items() for tensor in tensors
    }
    return {FILE: "".join(f"{_pattern(tensor)}={kind}\n" for tensor, kind in types.items()).encode()}


def _pattern(tensor: str) -> str:
    return f"^{re.escape(tensor)}$"


def _type(facts: WeightFacts | None) -> str | None:
    return None if facts is None else FLOATS.get(facts.kind, facts.kind)


def stored_bytes(deployment: Deployment) -> int:
    """Bytes of the planned tensors: whole blocks, as the formats count them."""
    return sum(layer.bytes for layer in deployment.plan.layers.values())


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """The type of every tensor as llama-quantize finds it: the first pattern that is found in its name."""
    patterns = read_patterns(exported[FILE].decode())
    names = tensor_names(model.config, [module.name for module in model.modules])
    types = {module.name: _found(names.get(module.name, ()), patterns) for module in model.modules}
    return {module: _facts(kind, model) for module, kind in types.items()}


def _found(tensors: tuple[str, ...], patterns: list[tuple[re.Pattern[str], str]]) -> str | None:
    """The type of a module's tensors. Raises ValueError where they differ."""
    kinds = {next((kind for pattern, kind in patterns if pattern.search(name)), None) for name in tensors}
    if len(kinds) > 1:
        raise ValueError(
            f"Tensors of one module must have one type. Got {tensors} with several. Export again."
        )
    return next(iter(kinds), None)


def read_patterns(text: str) -> list[tuple[re.Pattern[str], str]]:
    """Tokens between white space, split at the first `=`, the pattern in lower case, GGML's types.

    Raises ValueError for a token that llama-quantize stops at.
    """
    types = {kind.name.lower() for kind in gguf_library().GGMLQuantizationType}
    found = []
    for token in text.split():
        pattern, _, kind = token.partition("=")
        if not pattern or kind.lower() not in types:
            raise ValueError(f"A token must be PATTERN=TYPE of GGML. Got {token!r:.80}. Export again.")
        found.append((re.compile(pattern.lower()), kind.lower()))
    return found


def _facts(kind: str | None, model: ModelFacts) -> WeightFacts | None:
    ours = {theirs: name for name, theirs in FLOATS.items()}.get(kind or "", kind)
    if ours in (None, "f32", model.own_type):
        return None
    return WeightFacts.of(parse_scheme(str(ours)))
