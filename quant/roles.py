"""What a layer does in its model, told from structure first and names second."""

from __future__ import annotations

import re

from torch import nn

from quant.layers import EXPERT_OPS, Role

ATTENTION = re.compile(
    r"(^|[._])(attn|attention|self_attn|self_attention|cross_attn|cross_attention|crossattention|mha"
    r"|q_proj|k_proj|v_proj|o_proj|qkv|qkv_proj|query_key_value|c_attn|to_q|to_k|to_v|to_out|wq|wk|wv)($|[._0-9])",
    re.IGNORECASE,
)
FEED_FORWARD = re.compile(
    r"(^|[._])(mlp|ffn|ff|feed_forward|feedforward|fc1|fc2|c_fc|up_proj|down_proj|gate_proj|gate_up_proj"
    r"|intermediate|densereludense|dense_h_to_4h|dense_4h_to_h|experts?|lin1|lin2|linear1|linear2)($|[._0-9])",
    re.IGNORECASE,
)
BERT_OUTPUT = re.compile(r"(^|\.)layers?\.\d+\.output\.dense$")
HEADS = ("lm_head", "embed_out", "classifier", "head", "heads", "score", "fc")
CLASSIFIERS = re.compile(r"For\w*Classification\w*$")


def role_of(name: str, op: str, head: bool) -> Role:
    """The role of the layer at a module path.

    >>> role_of("model.layers.0.mlp.down_proj", "linear", head=False)
    'feed_forward'
    >>> role_of("encoder.layer.3.attention.output.dense", "linear", head=False)
    'attention'
    """
    if op == "embedding":
        return "embedding"
    if head:
        return "head"
    if op in EXPERT_OPS:
        return "feed_forward"
    if op in ("conv1d", "conv2d"):
        return "convolution"
    if ATTENTION.search(name):
        return "attention"
    return "feed_forward" if FEED_FORWARD.search(name) or BERT_OUTPUT.search(name) else "other"


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
