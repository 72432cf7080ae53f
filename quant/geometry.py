"""What a model's configuration says about serving it: its key-value cache and its experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

GENERATORS = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
CACHE_BITS = {
    "float32": 32, "float16": 16, "bfloat16": 16, "fp8_e4m3": 8, "fp8_e5m2": 8, "int8": 8, "int4": 4,
}  # fmt: skip
"""Bits of one cached value."""
CACHE_SCALE_BITS = {"int8": 16, "int4": 16}
"""Integers have one float16 scale for each key and each value vector: per token and head."""


@dataclass(frozen=True)
class Geometry:
    """Cached values per token and layer, attention windows, and experts.

    `cached` are the numbers one token leaves in one layer's cache: 2 * heads * head size, or the latent
    vector of multi-head latent attention; `vectors` are the pieces of them that share a scale: 2 * heads, or
    1; 0 where that is not known. `windows` has one entry per layer, None where attention is full;
    it is empty for a model that generates nothing. `attention` are the module paths of the attention layers,
    by their number in the cache; empty where they are not known. `hidden` is the length of a token's vector.
    `experts` of each block, `active` of them per token; 0 without experts.
    """

    cached: int
    windows: tuple[int | None, ...]
    experts: int = 0
    active: int = 0
    hidden: int = 0
    tied_embeddings: bool = False
    vectors: int = 0
    attention: tuple[str, ...] = ()

    def cache_bytes(self, context_length: int, batch: int, kind: str = "float16") -> int:
        """Bytes of keys and values of `batch` sequences of `context_length` tokens, with their scales.

        >>> Geometry(cached=2 * 8 * 128, windows=(None,) * 32).cache_bytes(8192, 1) == 2**30
        True
        """
        layers = range(len(self.windows))
        return sum(self.layer_cache_bytes(layer, context_length, batch, kind) for layer in layers)

    def layer_cache_bytes(self, layer: int, context_length: int, batch: int, kind: str) -> int:
        """Those of one attention layer; a window bounds its tokens.

        >>> geometry = Geometry(cached=2 * 8 * 128, windows=(None, 64), vectors=2 * 8)
        >>> geometry.layer_cache_bytes(0, 100, 1, "int4"), geometry.layer_cache_bytes(1, 100, 1, "int4")
        (105600, 67584)
        """
        tokens = batch * min(context_length, self.windows[layer] or context_length)
        bits = self.cached * CACHE_BITS[kind] + self.vectors * CACHE_SCALE_BITS.get(kind, 0)
        return -(-tokens * bits // 8)

    def expert_share(self, batch: int) -> Fraction:
        """The expected share of a block's experts that `batch` tokens use, when all are equally likely.

        >>> Geometry(0, (), experts=8, active=2).expert_share(1)
        Fraction(1, 4)
        """
        if not self.experts:
            return Fraction(1)
        return 1 - (1 - Fraction(min(self.active, self.experts), self.experts)) ** min(batch, 10_000)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `geometry_from_json` reads them back."""
        return {**asdict(self), "windows": list(self.windows), "attention": list(self.attention)}


def geometry_from_json(value: Mapping[str, Any]) -> Geometry:
    """Inverse of `Geometry.as_json`, for values that it wrote; older ones name no attention layers."""
    lists = {"windows": tuple(value["windows"]), "attention": tuple(value.get("attention", ()))}
    return Geometry(**{**value, **lists})


def geometry_of(config: Mapping[str, Any]) -> Geometry | None:
    """The geometry in a transformers configuration; None where it names no attention layers.

    >>> config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    >>> found = geometry_of(config | {"num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]})
    >>> found.cached, found.windows, found.hidden, found.vectors
    (64, (None, None), 64, 4)
    """
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, Mapping) else config
    layers = _whole(text, "num_hidden_layers", "n_layer", "num_layers")
    cached = _cached(text)
    if not layers or not cached:
        return None
    generates = any(word in str(config.get("architectures")) for word in GENERATORS)
    return Geometry(
        cached=cached,
        windows=_windows(text, layers) if generates else (),
        experts=_whole(text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        active=_whole(
            text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"
        ),
        hidden=_whole(text, "hidden_size", "n_embd", "d_model"),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        vectors=_vectors(text),
    )


def _cached(config: Mapping[str, Any]) -> int:
    latent = _whole(config, "kv_lora_rank")
    if latent:
        return latent + _whole(config, "qk_rope_head_dim")
    heads = _whole(config, "num_attention_heads", "n_head")
    size = _whole(config, "head_dim") or (_whole(config, "hidden_size", "n_embd") // heads if heads else 0)
    return 2 * (_whole(config, "num_key_value_heads") or heads) * size


def _vectors(config: Mapping[str, Any]) -> int:
    if _whole(config, "kv_lora_rank"):
        return 1
    return 2 * _whole(config, "num_key_value_heads", "num_attention_heads", "n_head")


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = _whole(config, "sliding_window") or None
    kinds = config.get("layer_types")
    if isinstance(kinds, list | tuple) and len(kinds) == layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window if config.get("use_sliding_window", True) else None,) * layers


def _whole(config: Mapping[str, Any], *names: str) -> int:
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)
