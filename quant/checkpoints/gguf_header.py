"""What a GGUF file says beside its tensors: hyperparameters, tokenizer, provenance. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quant.checkpoints.gguf_tokenizer import Vocabulary, read_vocabulary
from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import Source
from quant.digest import canonical_json
from quant.export.gguf_names import gguf_library
from quant.export.protocol import Deployment
from quant.plan import plan_json

PLAN_KEY, PROVENANCE_KEY = "bitplan.plan", "bitplan.provenance"
LOWERCASE, STRIP_ACCENTS = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"
MODULES = "modules.json"
POOLINGS = {
    "pooling_mode_mean_tokens": "MEAN",
    "pooling_mode_cls_token": "CLS",
    "pooling_mode_lasttoken": "LAST",
}
"""Switch of a sentence-transformers pooling -> GGUF's name."""


def describe(writer: Any, source: Source, config: Any, deployment: Deployment) -> None:
    """Add every key-value of a causal language model of the Llama type, or of BERT, to a `gguf.GGUFWriter`.

    `config` is the model's configuration as transformers completes it.
    """
    writer.add_type("model")
    writer.add_quantization_version(gguf_library().GGML_QUANT_VERSION)
    _hyperparameters(writer, config)
    if config.model_type == "bert":
        _encoder(writer, source, config)
    else:
        _decoder(writer, config)
    _tokenizer(writer, source, config)
    _provenance(writer, source, deployment)


def _hyperparameters(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _encoder(writer: Any, source: Source, config: Any) -> None:
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_token_type_count(config.type_vocab_size)
    pooling = read_pooling(source.folder)
    if pooling is not None:
        writer.add_pooling_type(gguf_library().PoolingType[pooling])


def read_pooling(folder: Path) -> str | None:
    """How a sentence-transformers folder makes one vector of a text's: MEAN, CLS or LAST.

    None for a folder that does not say. Raises CheckpointError for another way.
    """
    if not (folder / MODULES).is_file():
        return None
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        path = next((str(item["path"]) for item in modules if item["type"].endswith("Pooling")), None)
        if path is None:
            return None
        if Path(path).name != path:
            raise _pooling_refusal(path)
        told = json.loads((folder / path / "config.json").read_text(encoding="utf-8"))
        modes = [key for key, on in told.items() if key.startswith("pooling_mode") and on is True]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _pooling_refusal(repr(error)) from error
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise _pooling_refusal(", ".join(modes) or "none")
    return POOLINGS[modes[0]]


def _pooling_refusal(got: str) -> CheckpointError:
    return CheckpointError(
        f"{MODULES} must pool by one of {', '.join(POOLINGS)} to be written for llama.cpp. Got {got:.200}."
        f" Write the checkpoint without {MODULES}, and tell llama.cpp --pooling."
    )


def _decoder(writer: Any, config: Any) -> None:
    width = head_width(config)
    _experts(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf_library().RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)


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
    if found.lowercase is not None:
        writer.add_bool(LOWERCASE, found.lowercase)
        writer.add_bool(STRIP_ACCENTS, bool(found.strip_accents))
    _special_tokens(writer, source, found)


def _special_tokens(writer: Any, source: Source, found: Vocabulary) -> None:
    special = gguf_library().SpecialVocab(
        source.folder, load_merges=found.model == "gpt2", n_vocab=len(found.tokens)
    )
    for kind, token in (("bos", found.first), ("eos", found.last)):
        special.add_special_token[kind] = token is not None
        if token is not None:
            special.special_token_ids[kind] = token
    if found.model == "bert":
        special.special_token_ids |= {"sep": found.last, "unk": found.unknown}
        special.special_token_ids.pop("cls", None)
    special.add_to_gguf(writer, quiet=True)


def _provenance(writer: Any, source: Source, deployment: Deployment) -> None:
    from quant.checkpoints.front import provenance

    writer.add_string(PLAN_KEY, plan_json(deployment.plan))
    writer.add_string(PROVENANCE_KEY, canonical_json(provenance("gguf", source, deployment).as_json()))
