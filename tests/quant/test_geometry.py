from __future__ import annotations

from fractions import Fraction

from quant.geometry import Geometry, geometry_from_json, geometry_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def test_a_cache_grows_with_context_and_batch():
    geometry = geometry_of(LLAMA)
    assert geometry.cache_bytes(8192, 1) == 2 * 32 * 8 * 128 * 8192 * 2 == 2**30
    assert geometry.cache_bytes(8192, 3) == 3 * 2**30
    assert geometry.cache_bytes(8192, 1, "fp8_e4m3") == 2**29
    scales = 2 * 32 * 8 * 8192 * 2
    assert geometry.cache_bytes(8192, 1, "int4") == 2**28 + scales
    assert geometry.cache_bytes(8192, 2, "int8") == 2 * (2**29 + scales)
    assert geometry.layer_cache_bytes(3, 8192, 1, "int4") * 32 == 2**28 + scales


def test_sliding_windows_bound_the_cache():
    kinds = ["sliding_attention", "full_attention"]
    geometry = geometry_of(LLAMA | {"num_hidden_layers": 2, "sliding_window": 1024, "layer_types": kinds})
    assert geometry.windows == (1024, None)
    assert geometry.cache_bytes(4096, 1) == 2 * 8 * 128 * (1024 + 4096) * 2
    assert geometry_of(LLAMA | {"sliding_window": 64, "use_sliding_window": False}).windows == (None,) * 32


def test_latent_attention_keeps_one_vector_per_token():
    geometry = geometry_of(LLAMA | {"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert geometry.cached == 576
    assert geometry.layer_cache_bytes(0, 10, 1, "int8") == 10 * (576 + 2)


def test_what_generates_nothing_has_no_cache():
    bert = {
        "architectures": ["BertModel"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
    }
    assert geometry_of(bert).cache_bytes(512, 8) == 0
    assert geometry_of({"architectures": ["ResNetForImageClassification"]}) is None


def test_a_nested_text_configuration_counts():
    nested = {"architectures": ["VisionForConditionalGeneration"], "text_config": LLAMA}
    assert geometry_of(nested).cached == 2 * 8 * 128


def test_experts_that_a_step_uses():
    geometry = geometry_of(
        LLAMA | {"num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True}
    )
    assert (geometry.experts, geometry.active, geometry.tied_embeddings) == (8, 2, True)
    assert geometry.expert_share(1) == Fraction(1, 4)
    assert geometry.expert_share(2) == 1 - Fraction(9, 16)
    assert Geometry(0, ()).expert_share(5) == 1


def test_a_geometry_is_read_back():
    geometry = geometry_of(LLAMA)
    assert geometry_from_json(geometry.as_json()) == geometry
