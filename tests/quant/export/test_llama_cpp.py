"""The tensor-type file of llama-quantize: names, types and what llama.cpp would do otherwise."""

import dataclasses
import random
import re
from math import prod

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.export import llama_cpp
from quant.export.front import export, lint
from quant.export.gguf_names import OTHER_NAMES, architecture, tensor_names
from quant.export.protocol import Deployment, ExportRefused, ModelFacts, Module
from quant.gguf_blocks import GGUF_TYPES
from quant.layers import Excluded, Inventory, Layer
from quant.ops import matrix_shape
from quant.plan import Certificate, Digests
from quant.planning import build_plan

MENU = [*GGUF_TYPES, "bf16", "fp16", "q8_0-rtn"]
LLAMA = {"model_type": "llama", "num_hidden_layers": 12, "dtype": "bfloat16"}
BERT = {"model_type": "bert", "num_hidden_layers": 11, "dtype": "float32"}


def layer(name, shape, op="linear", aliases=()):
    return Layer(name, op, shape, matrix_shape(shape, op), prod(shape), None, "other", aliases, "float32")


def llama_layers():
    found = [layer("model.embed_tokens", (300, 256), "embedding", ("lm_head",))]
    for block in range(12):
        base = f"model.layers.{block}"
        found += [layer(f"{base}.self_attn.{part}_proj", (256, 256)) for part in "qkvo"]
        found += [layer(f"{base}.mlp.{part}_proj", (512, 256)) for part in ("gate", "up")]
        found.append(layer(f"{base}.mlp.down_proj", (256, 512)))
    return found


def bert_layers():
    found = [layer("bert.embeddings.word_embeddings", (300, 256), "embedding")]
    for block in range(11):
        base = f"bert.encoder.layer.{block}"
        found += [layer(f"{base}.attention.self.{part}", (256, 256)) for part in ("query", "key", "value")]
        found += [layer(f"{base}.attention.output.dense", (256, 256))]
        found += [layer(f"{base}.intermediate.dense", (512, 256)), layer(f"{base}.output.dense", (256, 512))]
    return found


def expert_layers():
    found = []
    for block in range(4):
        base = f"model.layers.{block}.mlp.experts"
        found += [layer(f"{base}.gate_up_proj", (4, 128, 256), "experts")]
        found += [layer(f"{base}.down_proj", (4, 256, 64), "experts")]
    return found


MODELS = {
    "qwen3_moe": (
        {"model_type": "qwen3_moe", "num_hidden_layers": 4},
        expert_layers(),
        (Excluded("model.layers.0.mlp.gate", "linear", 64, "router"),),
    ),
    "llama": (LLAMA, llama_layers(), ()),
    "bert": (BERT, bert_layers(), (Excluded("bert.pooler.dense", "linear", 256, "left out"),)),
}


def deployment(config, layers, assignment, excluded=()):
    kept = tuple(Excluded(x.name, x.op, 1, "kept") for x in layers if x.name not in assignment)
    planned = tuple(x for x in layers if x.name in assignment)
    inventory = Inventory(planned, (*kept, *excluded), 10**7, 1000)
    plan = build_plan(
        inventory, assignment, digests=Digests(), certificate=Certificate("feasible"), source="test"
    )
    return Deployment(plan, ModelFacts.of(inventory, config))


def single(name, shape, scheme, config=LLAMA, op="linear"):
    return deployment(config, [layer(name, shape, op)], {name: scheme})


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(sorted(MODELS)))
def test_random_plans_read_back_as_planned(seed, kind):
    config, layers, excluded = MODELS[kind]
    chance = random.Random(seed)
    small = [scheme for scheme in MENU if "_k" not in scheme]
    chosen = {x.name: chance.choice([*(small if x.matrix[1] % 256 else MENU), None]) for x in layers}
    assignment = {name: scheme for name, scheme in chosen.items() if scheme} | {layers[-1].name: "q5_1"}
    found = deployment(config, layers, assignment, excluded)
    assert lint("llama.cpp", found) == ()
    assert llama_cpp.read_back(export("llama.cpp", found), found.model) == found.expected
    assert llama_cpp.stored_bytes(found) == found.plan.totals.bytes


def test_every_tensor_is_named_once_anchored_and_escaped():
    config, layers, _ = MODELS["llama"]
    found = deployment(config, layers, {"model.layers.1.mlp.down_proj": "q6_k", "model.embed_tokens": "q8_0"})
    lines = export("llama.cpp", found)["tensor_types.txt"].decode().splitlines()
    assert r"^blk\.1\.ffn_down\.weight$=q6_k" in lines
    assert r"^blk\.11\.ffn_down\.weight$=bf16" in lines
    assert r"^token_embd\.weight$=q8_0" in lines
    assert r"^output\.weight$=q8_0" in lines
    assert len(lines) == len(set(lines)) == 12 * 7 + 2
    assert all(re.fullmatch(r"\^[a-z0-9_\\.]+\$=\w+", line) for line in lines)


def test_joined_experts_are_named_as_the_tensors_of_each():
    config, layers, routers = MODELS["qwen3_moe"]
    found = deployment(config, layers, {"model.layers.1.mlp.experts.gate_up_proj": "q3_k"}, routers)
    lines = export("llama.cpp", found)["tensor_types.txt"].decode().splitlines()
    assert r"^blk\.1\.ffn_gate_exps\.weight$=q3_k" in lines
    assert r"^blk\.1\.ffn_up_exps\.weight$=q3_k" in lines
    assert r"^blk\.1\.ffn_down_exps\.weight$=f32" in lines
    text = "\n".join(lines).replace("1\\.ffn_up_exps\\.weight$=q3_k", "1\\.ffn_up_exps\\.weight$=q4_k")
    with pytest.raises(ValueError, match="Tensors of one module must have one type"):
        llama_cpp.read_back({"tensor_types.txt": text.encode()}, found.model)


def test_routers_of_experts_are_left_alone_by_llama_quantize():
    found = single("model.layers.0.mlp.gate", (8, 256), "q8_0", MODELS["qwen3_moe"][0])
    with pytest.raises(ExportRefused, match=r"leaves this tensor alone\. Got blk\.0\.ffn_gate_inp\.weight"):
        export("llama.cpp", found)


def test_the_first_pattern_found_wins_in_any_case():
    text = "^BLK\\.0\\.ffn=Q4_K\n  ffn_down=q5_K ^blk\\.0\\.ffn_down\\.weight$=q6_k"
    model = ModelFacts(LLAMA, (Module("model.layers.0.mlp.down_proj", "linear"),))
    read = llama_cpp.read_back({"tensor_types.txt": text.encode()}, model)
    assert read["model.layers.0.mlp.down_proj"].kind == "q4_k"


@pytest.mark.parametrize("token", ["blk", "=q4_k", "blk=", "blk=w4"])
def test_tokens_that_llama_quantize_stops_at_are_refused(token):
    with pytest.raises(ValueError, match=r"A token must be PATTERN=TYPE of GGML\. Got"):
        llama_cpp.read_patterns(token)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (single("model.layers.0.mlp.down_proj", (8, 256), "w4"), r"down_proj: weights must be q4_0.* \(as wide: q4_0 or q4_1 or q4_k\).*Got w4\."),
        (single("fc", (8, 256), "q4_k"), r"fc: it must have a tensor in GGUF's table of llama"),
        (single("model.layers.0.mlp.down_proj", (8, 256), "w7-aint8"), r"as wide: q8_0\).*left alone\. Got w7-aint8\."),
        (single("layer", (8, 256), "q4_k", {"model_type": "resnet"}), r"config\.json: model_type must be.*'resnet'"),
        (single("layer", (8, 256), "q4_k", {"model_type": "llama"}), r"config\.json: one of num_hidden_layers"),
        (
            single("embeddings.position_embeddings", (64, 256), "q8_0", BERT, "embedding"),
            r"llama-quantize leaves this tensor alone\. Got position_embd\.weight",
        ),
        (
            single("embeddings.token_type_embeddings", (2, 256), "q8_0", BERT, "embedding"),
            r"llama-quantize leaves this tensor alone\. Got token_types\.weight",
        ),
    ],
)  # fmt: skip
def test_refusals_name_layer_and_rule(found, message):
    with pytest.raises(ExportRefused, match=message):
        export("llama.cpp", found)


@pytest.mark.parametrize(
    ("scheme", "columns", "fallback"), [("q4_k", 288, "q5_0"), ("q2_k", 96, "q4_0"), ("q6_k", 100, "fp16")]
)
def test_a_type_that_would_fall_back_is_refused_with_the_fallback(scheme, columns, fallback):
    good = single("model.layers.0.mlp.down_proj", (8, 512), scheme)
    name, planned = next(iter(good.plan.layers.items()))
    bad = dataclasses.replace(planned, shape=(8, columns), matrix=(8, columns))
    model = ModelFacts(good.model.config, (Module(name, "linear"),))
    found = Deployment(dataclasses.replace(good.plan, layers={name: bad}), model)
    with pytest.raises(ExportRefused, match=rf"whole blocks of 256\. Got {scheme}: .*would store {fallback}"):
        export("llama.cpp", found)


def test_architectures_come_from_the_table_of_the_library():
    assert set(OTHER_NAMES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
    assert architecture({"model_type": "qwen2"}) == "qwen2"
    assert architecture({"model_type": "gpt_oss"}) == "gpt-oss"
    assert architecture({}) is None


def test_names_of_gguf_hold_nothing_that_a_pattern_would_change():
    assert all(re.fullmatch(r"[a-z0-9_.{}]+", name) for name in gguf.TENSOR_NAMES.values())


def test_names_of_base_models_are_found_too():
    assert tensor_names(LLAMA, ["layers.3.self_attn.q_proj"]) == {
        "layers.3.self_attn.q_proj": ("blk.3.attn_q.weight",)
    }
    assert tensor_names(BERT, ["encoder.layer.2.output.dense", "bert.pooler.dense"]) == {
        "encoder.layer.2.output.dense": ("blk.2.ffn_down.weight",)
    }
