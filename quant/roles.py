"""What a layer does in its model, told from structure first and names second."""

from __future__ import annotations

import re

from torch import nn

from quant.layers import EXPERT_OPS, Role

ATTENTION = re.compile(
    r"(^|[._])(attn|attn1|attention|self_attn|self_attention|cross_attn|cross_attention|crossattention|mha"
    r"|q_proj|k_proj|v_proj|o_proj|qkv|qkv_proj|query_key_value|c_attn|to_q|to_k|to_v|to_out|wq|wk|wv)($|[._0-9])",
    re.IGNORECASE,
)
FEED_FORWARD = re.compile(
    r"(^|[._])(mlp|ffn|ff|feed_forward|feedforward|fc1|fc2|c_fc|up_proj|down_proj|gate_proj|gate_up_proj"
    r"|intermediate|densereludense|dense_h_to_4h|dense_4h_to_h|experts?|lin1|lin2|linear1|linear2)($|[._0-9])",
    re.IGNORECASE,
)
CROSS_ATTENTION = re.compile(
    r"(^|[._])(attn2|cross_?attn|cross_?attention|encoder_attn|encoder_attention|encdecattention)$",
    re.IGNORECASE,
)
QUERIES_AND_KEYS = (("to_q", "to_k"), ("q_proj", "k_proj"), ("query", "key"))
EMBEDDING = re.compile(
    r"(^|[._])(time|timestep|class|label|add|aug|pos|patch|text|guidance)"
    r"_?(embed|embedding|embedder|emb|emb_proj)($|[._0-9])",
    re.IGNORECASE,
)
EXPERT = re.compile(r"(^|\.)experts\.\d+\.", re.IGNORECASE)
BERT_OUTPUT = re.compile(r"(^|\.)layers?\.\d+\.output\.dense$")
HEADS = ("lm_head", "embed_out", "classifier", "head", "heads", "score", "fc")
CLASSIFIERS = re.compile(r"For\w*Classification\w*$")


def role_of(name: str, op: str, *, head: bool = False, router: bool = False, cross: bool = False) -> Role:
    """The role of the layer at a module path; what its place in the model tells (`head`, `router`, `cross`
    for cross-attention) goes before its name.

    >>> role_of("model.layers.0.mlp.down_proj", "linear")
    'feed_forward'
    >>> role_of("encoder.layer.3.attention.output.dense", "linear")
    'self_attention'
    >>> role_of("blocks.0.attn2.to_k", "linear", cross=True), role_of("time_embedding.linear_1", "linear")
    ('cross_attention', 'embedding')
    """
    if op == "embedding":
        return "embedding"
    if head or router:
        return "head" if head else "router"
    if op in EXPERT_OPS or EXPERT.search(name):
        return "expert"
    if op in ("conv1d", "conv2d"):
        return "convolution"
    return "cross_attention" if cross else _role_by_name(name)


def _role_by_name(name: str) -> Role:
    if EMBEDDING.search(name):
        return "embedding"
    if ATTENTION.search(name):
        return "self_attention"
    return "feed_forward" if FEED_FORWARD.search(name) or BERT_OUTPUT.search(name) else "other"


def cross_attention_paths(model: nn.Module) -> frozenset[str]:
    """Paths of all modules inside cross-attention.

    A module is that when it says so (`is_cross_attention`), when its queries and keys have inputs of
    different widths, or else when it is named so.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    found = tuple(path for path, module in named.items() if path and _is_cross_attention(path, module))
    return frozenset(path for path in named if any(f"{path}.".startswith(f"{root}.") for root in found))


def _is_cross_attention(path: str, module: nn.Module) -> bool:
    declared = getattr(module, "is_cross_attention", None)
    if isinstance(declared, bool):
        return declared
    for names in QUERIES_AND_KEYS:
        widths = {getattr(getattr(module, name, None), "in_features", None) for name in names}
        if None not in widths and len(widths) > 1:
            return True
    return CROSS_ATTENTION.search(path) is not None


def output_heads(model: nn.Module) -> frozenset[str]:
    """Paths of the modules that make the model's outputs from its last features.

    In this order: what `get_output_embeddings` gives (transformers language models), what `get_classifier`
    gives (timm), the last linear layer with `config.num_labels` outputs of a classification model, else the
    last linear layer where it stands under a top-level name such as lm_head, classifier, head or fc.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    declared = _declared(model)
    if declared is not None:
        return frozenset(name for name, module in named.items() if module is declared)
    linears = [(name, module) for name, module in named.items() if isinstance(module, nn.Linear)]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if CLASSIFIERS.search(type(model).__name__):
        linears = [(name, module) for name, module in linears if module.out_features == labels]
        return frozenset(name for name, _ in linears[-1:])
    return frozenset(name for name, _ in linears[-1:] if name.split(".", 1)[0] in HEADS)


def _declared(model: nn.Module) -> nn.Module | None:
    for method in ("get_output_embeddings", "get_classifier"):
        getter = getattr(model, method, None)
        if callable(getter):
            try:
                module = getter()
            except (NotImplementedError, AttributeError, TypeError):
                continue
            if isinstance(module, nn.Module):
                return module
    return None
