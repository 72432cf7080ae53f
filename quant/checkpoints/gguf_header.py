"""What a GGUF file says beside its tensors: hyperparameters, tokenizer, provenance. No torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quant.checkpoints.gguf_tokenizer import Vocabulary, read_vocabulary
from quant.checkpoints.source import Source
from quant.digest import canonical_json
from quant.export.gguf_names import gguf_library
from quant.export.protocol import Deployment
from quant.plan import plan_json

PLAN_KEY, PROVENANCE_KEY = "bitplan.plan", "bitplan.provenance"


def describe(writer: Any, source: Source, config: Any, deployment: Deployment) -> None:
    """Add every key-value of a causal language model of the Llama type to a `gguf.GGUFWriter`.

    `config` is the model's configuration as transformers completes it.
    """
    writer.add_type("model")
    writer.add_quantization_version(gguf_library().GGML_QUANT_VERSION)
    _hyperparameters(writer, config)
    _tokenizer(writer, source, config)
    _provenance(writer, source, deployment)


def _hyperparameters(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    width = head_width(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    _experts(writer, config)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _experts(writer: Any, config: Any) -> None:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def head_width(config: Any) -> int:
    """Columns of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context_length(config: Any) -> int:
    """Tokens for which llama.cpp, which attends to all of them, computes what the model does."""
    window = getattr(config, "sliding_window", None)
    longest: int = config.max_position_embeddings
    return min(longest, window) if window and getattr(config, "use_sliding_window", True) else longest


def _tokenizer(writer: Any, source: Source, config: Any) -> None:
    found = read_vocabulary(source.folder, config.vocab_size)
    if found is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)
    _special_tokens(writer, source, found)


def _special_tokens(writer: Any, source: Source, found: Vocabulary) -> None:
    special = gguf_library().SpecialVocab(
        source.folder, load_merges=found.scores is None, n_vocab=len(found.tokens)
    )
    for kind, token in (("bos", found.first), ("eos", found.last)):
        special.add_special_token[kind] = token is not None
        if token is not None:
            special.special_token_ids[kind] = token
    special.add_to_gguf(writer, quiet=True)


def _provenance(writer: Any, source: Source, deployment: Deployment) -> None:
    from quant.checkpoints.front import provenance

    writer.add_string(PLAN_KEY, plan_json(deployment.plan))
    writer.add_string(PROVENANCE_KEY, canonical_json(asdict(provenance("gguf", source, deployment))))
