from __future__ import annotations

import json

import pytest

from service.ingest.model_folder import check_model

INDEX = "model.safetensors.index.json"


def with_config(files, **members):
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | members).encode()}


def test_a_sound_model_gives_its_facts(sound_model, on_disk):
    facts = check_model(on_disk(sound_model))
    assert facts.as_json() == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tensors": 2,
        "parameters": 36,
        "weight_bytes": 144,
    }


DIFFUSERS = {"model_type": None, "architectures": None, "_class_name": "DiTTransformer2DModel"}


def test_a_diffusers_model_is_told_by_its_class(sound_model, on_disk):
    files = with_config(sound_model, **DIFFUSERS)
    files["diffusion_pytorch_model.safetensors"] = files.pop("model.safetensors")
    assert check_model(on_disk(files)).model_type == "DiTTransformer2DModel"


@pytest.mark.parametrize(
    ("members", "slug", "pointer"),
    [
        (DIFFUSERS | {"_class_name": "SomePipeline"}, "invalid-config", "/_class_name"),
        (DIFFUSERS | {"_class_name": 3}, "invalid-config", "/_class_name"),
        (DIFFUSERS | {"auto_map": {}}, "remote-code", "/auto_map"),
        ({"model_type": None}, "invalid-config", "/model_type"),
        ({"model_type": 3}, "invalid-config", "/model_type"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "remote-code", "/auto_map"),
        ({"text_config": {"auto_map": {}}}, "remote-code", "/text_config/auto_map"),
        ({"trust_remote_code": True}, "remote-code", "/trust_remote_code"),
        ({"_attn_implementation_internal": "x"}, "remote-code", "/_attn_implementation_internal"),
        ({"_attn_implementation": "someone/kernel"}, "remote-code", "/_attn_implementation"),
        ({"attn_implementation": "someone/kernel:f"}, "remote-code", "/attn_implementation"),
        ({"attn_implementation": {"": "a/kernel"}}, "remote-code", "/attn_implementation/"),
        ({"_experts_implementation": "someone/kernel"}, "remote-code", "/_experts_implementation"),
        ({"use_kernels": True}, "remote-code", "/use_kernels"),
        ({"kernel_config": {}}, "remote-code", "/kernel_config"),
        ({"d_model": 10**12}, "invalid-config", "/d_model"),
        ({"hidden_size": 1e12}, "invalid-config", "/hidden_size"),
        ({"hidden_sizes": [64, 10**12]}, "invalid-config", "/hidden_sizes/1"),
        ({"depths": [3, 10**6]}, "invalid-config", "/depths/1"),
        ({"max_position_embeddings": 2**62}, "invalid-config", "/max_position_embeddings"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already-quantized", "/quantization_config"),
        ({"quantization": {"bits": 4}}, "already-quantized", "/quantization"),
        ({"hidden_size": 10**12}, "invalid-config", "/hidden_size"),
        ({"hidden_size": -5}, "invalid-config", "/hidden_size"),
        ({"num_hidden_layers": 1_000_000}, "invalid-config", "/num_hidden_layers"),
        ({"vision_config": {"num_channels": 10**9}}, "invalid-config", "/vision_config/num_channels"),
    ],
)
def test_a_bad_config_is_refused_with_the_member(sound_model, on_disk, problem_of, members, slug, pointer):
    problem = problem_of(check_model, on_disk(with_config(sound_model, **members)))
    assert (problem.slug, problem.pointer, problem.status) == (slug, pointer, 422)


def test_usual_configs_pass(sound_model, on_disk):
    check_model(
        on_disk(
            with_config(
                sound_model,
                num_hidden_layers=80,
                vocab_size=256_000,
                sliding_window=None,
                n_positions=-1,
                vision_feature_layer=-2,
                attn_implementation={"text_config": "flash_attention_2"},
                max_position_embeddings=10_485_760,
                layer_norm_eps=1e-5,
                scale_depth=1.4,
                rope_theta=10**11,
                num_labels=10,
            )
        )
    )


@pytest.mark.parametrize(
    "config", [b"[]", b"", b"{", b'{"model_type": "a", "model_type": "b"}', b"{}" + b" " * 2**20]
)
def test_a_config_that_is_no_object_is_refused(sound_model, on_disk, problem_of, config):
    problem = problem_of(check_model, on_disk(sound_model | {"config.json": config}))
    assert problem.slug == "invalid-config"
    assert "config.json" in problem.detail


def sharded(make_safetensors, make_floats, weight_map):
    return {
        "config.json": b'{"model_type": "llama"}',
        "m-1.safetensors": make_safetensors({"a.weight": make_floats(2, 2)}),
        "m-2.safetensors": make_safetensors({"b.weight": make_floats(2, 2)}),
        INDEX: json.dumps({"weight_map": weight_map}).encode(),
    }


GOOD = {"a.weight": "m-1.safetensors", "b.weight": "m-2.safetensors"}


def test_a_sharded_model_passes(make_safetensors, make_floats, on_disk):
    assert check_model(on_disk(sharded(make_safetensors, make_floats, GOOD))).tensors == 2


@pytest.mark.parametrize(
    ("weight_map", "slug", "words"),
    [
        (
            GOOD | {"a.weight": "../m-1.safetensors"},
            "shard-not-in-manifest",
            "'../m-1.safetensors' for tensor",
        ),
        (GOOD | {"c.weight": "m-3.safetensors"}, "shard-not-in-manifest", "m-3.safetensors"),
        (GOOD | {"c.weight": "m-1.safetensors"}, "invalid-shard-index", "does not hold"),
        (GOOD | {"a.weight": "/etc/passwd"}, "shard-not-in-manifest", "'/etc/passwd' for tensor"),
        (GOOD | {"a.weight": "config.json"}, "shard-not-in-manifest", "'config.json' for tensor"),
        (GOOD | {"a.weight": "ab" * 32}, "shard-not-in-manifest", "abab"),
        ({"a.weight": "m-1.safetensors"}, "invalid-shard-index", "'b.weight' of m-2.safetensors left out"),
        (GOOD | {"a.weight": "m-2.safetensors"}, "invalid-shard-index", "does not hold"),
        (GOOD | {"a.weight": 7}, "invalid-shard-index", "weight_map"),
        (["a"], "invalid-shard-index", "weight_map"),
    ],
)
def test_an_index_names_only_what_is_there(
    make_safetensors, make_floats, on_disk, problem_of, weight_map, slug, words
):
    problem = problem_of(check_model, on_disk(sharded(make_safetensors, make_floats, weight_map)))
    assert problem.slug == slug
    assert words in problem.detail


def test_shards_without_an_index_are_refused(make_safetensors, make_floats, on_disk, problem_of):
    files = sharded(make_safetensors, make_floats, GOOD)
    del files[INDEX]
    assert problem_of(check_model, on_disk(files)).extra == {"missing": [INDEX]}


def test_a_tensor_in_two_shards_is_refused(make_safetensors, make_floats, on_disk, problem_of):
    files = sharded(make_safetensors, make_floats, {"a.weight": "m-1.safetensors"})
    files["m-2.safetensors"] = files["m-1.safetensors"]
    assert "'a.weight'" in problem_of(check_model, on_disk(files)).detail


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [("a.weight", "I8", 1), ("a.weight", "F8_E4M3", 1), ("a.weight", "U8", 1), ("a.qweight", "I32", 4)],
)
def test_quantized_weights_are_refused(sound_model, make_safetensors, on_disk, problem_of, name, dtype, size):
    weights = make_safetensors({name: (dtype, [2, 2], b"\0" * 4 * size)})
    problem = problem_of(check_model, on_disk(sound_model | {"model.safetensors": weights}))
    assert problem.slug == "already-quantized"
    assert "Send the original model" in problem.detail


def test_integer_buffers_are_no_quantized_weights(sound_model, make_safetensors, make_floats, on_disk):
    weights = {"a.weight": make_floats(2, 2), "attn.bias": ("U8", [2, 2], b"\1" * 4)}
    check_model(on_disk(sound_model | {"model.safetensors": make_safetensors(weights)}))


def test_a_model_without_matrices_has_nothing_to_quantize(
    sound_model, make_safetensors, make_floats, on_disk, problem_of
):
    weights = make_safetensors({"norm.weight": make_floats(8)})
    problem = problem_of(check_model, on_disk(sound_model | {"model.safetensors": weights}))
    assert problem.slug == "nothing-to-quantize"
