"""GGUF files: the planned types, the very weights that were measured, exact sizes, and the tokenizer."""

import json
import random
from dataclasses import replace

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quant.apply import parameter_of, quantize_
from quant.checkpoints import front, gguf_header
from quant.checkpoints import gguf as gguf_checkpoint
from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import Source
from quant.export.gguf_names import tensor_names
from quant.export.protocol import Deployment, ExportRefused
from quant.gguf_blocks import GGUF_TYPES
from quant.inventory import take_inventory
from quant.plan import parse_plan
from tests.deployments import deployment_of

SMALL = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_0-rtn", "bf16", "fp16"]
SIDES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "bert": (BertModel, BertConfig, {"type_vocab_size": 2}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-bf16": (LlamaForCausalLM, LlamaConfig, {"dtype": torch.bfloat16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 48}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 128}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
}


class Saved:
    """A model folder with random weights, and everything that a checkpoint is written from."""

    def __init__(self, folder, kind, size, **changes):
        build, config, options = MODELS[kind]
        torch.manual_seed(3)
        model = build(config(vocab_size=size, **SIDES, **HEADS, **{**options, **changes}))
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                torch.nn.init.normal_(parameter, 1, 0.3)
        model.to(options.get("dtype", torch.float32)).save_pretrained(folder)
        self.folder, self.source = folder, Source.open(folder)
        self.auto = AutoModel if kind == "bert" else AutoModelForCausalLM
        own = (["*word_embeddings"], ["pooler.dense"]) if kind == "bert" else (["*"], [])
        self.inventory = take_inventory(self.load(), include=own[0], exclude=own[1])
        self.every = take_inventory(self.load(), include=["*"])

    def load(self):
        return self.auto.from_pretrained(self.folder)

    def deployment(self, choose, kept=()):
        part = tuple(layer for layer in self.inventory.layers if layer.name not in kept)
        assignment = {layer.name: choose(layer) for layer in part}
        return deployment_of(self.source, replace(self.inventory, layers=part), assignment, self.every)

    def random(self, seed):
        chance = random.Random(seed)
        kept = {layer.name for layer in self.inventory.layers[1:] if chance.random() < 0.2}
        wide = [*SMALL, *GGUF_TYPES]
        return self.deployment(lambda layer: chance.choice(SMALL if layer.matrix[1] % 256 else wide), kept)

    def write(self, deployment, out):
        return front.write("gguf", self.source, deployment, out)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, byte_level, word_pieces):
    built = {}

    def build(kind, **changes):
        key = (kind, *changes)
        if key not in built:
            folder = tmp_path_factory.mktemp(kind)
            tokenizer = word_pieces if kind == "bert" else byte_level
            built[key] = Saved(folder, kind, tokenizer(folder), **changes)
        return built[key]

    return build


def stored_types(path):
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}


def planned_types(deployment):
    names = tensor_names(deployment.model.config, deployment.layers)
    kinds = {module: scheme.weight.short for module, scheme in deployment.schemes.items()}
    found = {
        name: "f16" if kind == "fp16" else kind for module, kind in kinds.items() for name in names[module]
    }
    if deployment.model.config.get("tie_word_embeddings"):
        found.pop("output.weight", None)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_the_file_holds_the_planned_types_and_the_measured_weights(kind, saved, tmp_path):
    model, out = saved(kind), tmp_path / "model.gguf"
    deployment = model.random(len(kind))
    model.write(deployment, out)
    own = "bf16" if kind == "llama-bf16" else "f32"
    vectors = ("_norm.weight", ".bias", "_inp.weight", "position_embd.weight", "token_types.weight")
    left = {name: "f32" if name.endswith(vectors) else own for name in stored_types(out)}
    assert stored_types(out) == left | planned_types(deployment)
    simulated = quantize_(model.load(), deployment.plan, model.inventory)
    for name, weight in gguf_checkpoint.read_back(out, deployment):
        own_weight = parameter_of(simulated, model.inventory.by_name[name])
        assert torch.equal(weight.to(own_weight.dtype), own_weight), name
    if kind in ("bert", "mixtral", "qwen3_moe"):
        return  # transformers reads no encoders or sizes of experts from GGUF; nightly tests ask llama.cpp
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=out.name, dtype=MODELS[kind][2].get("dtype", torch.float32)
    )
    for layer in model.inventory.layers:
        assert torch.equal(parameter_of(loaded, layer), parameter_of(simulated, layer)), layer.name
    ids = torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        difference = loaded(ids).logits - simulated(ids).logits
    assert difference.abs().max() < 1e-5


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["bert", "llama", "llama-tied", "mixtral"]))
def test_sizes_are_those_that_the_dry_run_told(seed, kind, saved, tmp_path_factory):
    model, out = saved(kind), tmp_path_factory.mktemp("out") / "model.gguf"
    deployment = model.random(seed)
    told = front.layout("gguf", model.source, deployment)
    assert model.write(deployment, out).layout == told
    tensors = gguf.GGUFReader(out).tensors
    assert told.bytes == out.stat().st_size
    assert told.payload_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    planned = planned_types(deployment)
    assert told.planned_bytes == sum(int(tensor.n_bytes) for tensor in tensors if tensor.name in planned)


def test_header_says_what_the_configuration_does(saved, tmp_path):
    model, out = saved("mistral"), tmp_path / "model.gguf"
    deployment = model.deployment(lambda _: "q8_0")
    model.write(deployment, out)
    fields = fields_of(out)
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 48
    assert fields["llama.attention.head_count_kv"] == 2
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(fields["tokenizer.ggml.tokens"]) == 300
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.add_bos_token"]) == (0, False)
    assert parse_plan(fields[gguf_header.PLAN_KEY]) == deployment.plan
    told = json.loads(fields[gguf_header.PROVENANCE_KEY])
    assert (told["consumer"], told["plan"]) == ("gguf", deployment.plan.digest)
    assert told["model"] == model.source.digest


def fields_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_header_of_an_encoder_says_what_the_configuration_does(saved, tmp_path):
    model, out = saved("bert"), tmp_path / "model.gguf"
    model.write(model.deployment(lambda _: "q8_0"), out)
    fields = fields_of(out)
    assert fields["general.architecture"] == "bert"
    assert (fields["bert.attention.causal"], fields["bert.context_length"]) == (False, 64)
    assert fields["bert.attention.layer_norm_epsilon"] == pytest.approx(1e-12)
    assert "bert.pooling_type" not in fields
    assert fields["tokenizer.ggml.model"] == "bert"
    assert fields["tokenizer.ggml.token_type_count"] == 2
    kinds = ("bos", "unknown", "seperator", "padding", "mask")
    assert [fields[f"tokenizer.ggml.{kind}_token_id"] for kind in kinds] == [2, 1, 3, 0, 4]
    assert fields["tokenizer.ggml.normalizer.lowercase"] is True
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert set(tensors) == {name for name in tensors if not name.startswith("cls")}
    own = model.load().embeddings.position_embeddings.weight.detach()
    assert torch.equal(torch.from_numpy(tensors["position_embd.weight"].data.copy()), own)


POOLING = {"word_embedding_dimension": 64, "pooling_mode_max_tokens": False}


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "MEAN"),
        ({"pooling_mode_cls_token": True}, "CLS"),
        ({"pooling_mode_lasttoken": True}, "LAST"),
        ({"pooling_mode_max_tokens": True}, r"must pool by one of .* Got pooling_mode_max_tokens\."),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "Got pooling_mode_cls_token, "),
        ({}, r"Got none\. Write the checkpoint without modules\.json"),
        ([1], "Got AttributeError"),
        (None, "Got FileNotFoundError"),
    ],
)
def test_pooling_of_a_sentence_model(told, found, tmp_path):
    modules = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    if told is not None:
        value = {**POOLING, **told} if isinstance(told, dict) else told
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(value))
    if found.isupper():
        assert gguf_header.read_pooling(tmp_path) == found
        return
    with pytest.raises(CheckpointError, match=found):
        gguf_header.read_pooling(tmp_path)


def test_pooling_is_read_from_the_folder_alone(tmp_path):
    assert gguf_header.read_pooling(tmp_path) is None
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Pooling", "path": "../other"}]))
    with pytest.raises(CheckpointError, match=r"Got \.\./other\."):
        gguf_header.read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Transformer", "path": ""}]))
    assert gguf_header.read_pooling(tmp_path) is None


def test_corrected_biases_of_an_encoder_and_its_pooling_are_written(tmp_path, word_pieces):
    model = Saved(tmp_path / "model", "bert", word_pieces(tmp_path / "model"))
    (model.folder / "modules.json").write_text(json.dumps([{"type": "a.Pooling", "path": "pool"}]))
    (model.folder / "pool").mkdir()
    (model.folder / "pool" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    known = model.deployment(lambda _: "q8_0")
    deployment = Deployment(replace(known.plan, corrections={"bias": 1}), known.model)
    name = "encoder.layer.1.output.dense.bias"
    changed = model.load().state_dict()[name] + 1
    out = tmp_path / "model.gguf"
    front.write("gguf", model.source, deployment, out, corrected={name: changed})
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert torch.equal(torch.from_numpy(tensors["blk.1.ffn_down.bias"].data.copy()), changed)
    assert fields_of(out)["bert.pooling_type"] == gguf.PoolingType.MEAN


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        ("pooler.dense", "it must have a tensor in GGUF's table of bert, or be excluded"),
        ("embeddings.position_embeddings", "llama.cpp reads this table as float32"),
        ("embeddings.token_type_embeddings", "llama.cpp reads this table as float32"),
    ],
)
def test_layers_that_llama_cpp_does_not_quantize_in_encoders_are_refused(layer, rule, saved):
    model = saved("bert")
    alone = replace(model.every, layers=(model.every.by_name[layer],))
    found = front.lint("gguf", deployment_of(model.source, alone, {layer: "q8_0"}, model.every))
    assert [(item.layer, item.rule) for item in found] == [(layer, rule)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, r"hidden_act must be one of gelu, .*Got 'relu'"),
        ({"position_embedding_type": "relative_key"}, r"must be 'absolute'\. Got 'relative_key'"),
        ({"is_decoder": True}, r"is_decoder must be false"),
        ({"architectures": ["BertForMaskedLM"]}, r"architectures must name BertModel"),
    ],
)
def test_encoders_that_cannot_be_said_are_refused(change, message, saved):
    model = saved("bert")
    known = model.deployment(lambda _: "q8_0")
    changed = Deployment(known.plan, replace(known.model, config={**known.model.config, **change}))
    with pytest.raises(ExportRefused, match=message):
        front.layout("gguf", model.source, changed)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


def test_yarn_is_told(tmp_path):
    rope = {**YARN, "beta_fast": 16, "attention_factor": 1.1386294}
    model, out = Saved(tmp_path / "model", "qwen2", 300, rope_parameters=rope), tmp_path / "model.gguf"
    model.write(model.deployment(lambda _: "q8_0"), out)
    told = {key.removeprefix("qwen2.rope.scaling."): value for key, value in fields_of(out).items()}
    assert (told["type"], told["factor"], told["original_context_length"]) == ("yarn", 4.0, 16)
    assert (told["yarn_beta_fast"], told["yarn_beta_slow"]) == (16, 1)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotations_are_told(kind, saved, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "llama3":
        more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        rope |= more
    model, out = Saved(tmp_path / "model", "llama", 300, rope_parameters=rope), tmp_path / "model.gguf"
    model.write(model.deployment(lambda _: "q8_0"), out)
    reader = gguf.GGUFReader(out)
    if kind == "linear":
        assert reader.fields["llama.rope.scaling.type"].contents() == "linear"
        assert reader.fields["llama.rope.scaling.factor"].contents() == 4.0
        return
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(
        plain / torch.from_numpy(factors.copy()), model.load().model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )


def test_biases_lie_in_the_order_of_their_rows(tmp_path):
    model, out = Saved(tmp_path / "model", "llama", 300, attention_bias=True), tmp_path / "model.gguf"
    model.write(model.deployment(lambda _: "q8_0"), out)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    stored = model.load().model.layers[0].self_attn.k_proj.bias.detach().reshape(2, 2, 8)
    written = torch.from_numpy(tensors["blk.0.attn_k.bias"].data.copy())
    assert torch.equal(written, stored.transpose(1, 2).reshape(-1))
    assert tensors["blk.0.attn_k.bias"].tensor_type == gguf.GGMLQuantizationType.F32


def test_a_folder_without_a_tokenizer_is_written_without_one(tmp_path):
    model, out = Saved(tmp_path / "model", "qwen2", 300), tmp_path / "model.gguf"
    model.write(model.deployment(lambda _: "q8_0"), out)
    assert gguf.GGUFReader(out).fields["tokenizer.ggml.model"].contents() == "no_vocab"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w4", r"q_proj: weights must be q4_0, .*\(as wide: q4_0 or q4_1 or q4_k\).*Got w4\."),
        ("w3-g32", r"as wide: q3_k\).*Got w3-g32\."),
        ("nvfp4", r"as wide: q4_0.*Got nvfp4"),
    ],
)
def test_other_formats_are_refused_and_told_which_to_use(scheme, message, saved, tmp_path):
    model = saved("llama")
    deployment = model.deployment(lambda _: scheme, kept=("model.embed_tokens", "lm_head"))
    with pytest.raises(ExportRefused, match=message):
        model.write(deployment, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, r"config\.json: model_type must be one of bert, llama, .*Got 'gemma2'"),
        ({"architectures": ["LlamaModel"]}, r"architectures must name LlamaForCausalLM\. Got \['LlamaModel'\]"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, r"norm_topk_prob must be true"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"every block must have experts"),
        ({"hidden_act": "gelu"}, r"hidden_act must be 'silu'\. Got 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"the rope type must be one of default, .*Got 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"yarn's factor must be a number of at least 1\. Got None"),
        ({"rope_parameters": {**YARN, "attention_factor": 2}}, r"attention_factor must be 1\.13863\. Got 2"),
        ({"rope_parameters": {**YARN, "mscale": 0.7}}, r"yarn's mscale must not be given\. Got 0\.7"),
        ({"rope_parameters": {**YARN, "truncate": False}}, r"yarn's truncate must be true\. Got False"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, r"rope type .*Got 'dynamic'"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_said_are_refused(change, message, saved):
    model = saved("llama")
    known = model.deployment(lambda _: "q8_0")
    changed = Deployment(known.plan, replace(known.model, config={**known.model.config, **change}))
    with pytest.raises(ExportRefused, match=message):
        front.layout("gguf", model.source, changed)


def test_a_stored_tensor_without_a_place_is_refused(tmp_path):
    model = Saved(tmp_path / "model", "llama", 300)
    place = model.folder / "model.safetensors"
    tensors = {**load_file(place), "model.layers.0.adapter.weight": torch.ones(2, 2)}
    save_file(tensors, place, {"format": "pt"})
    model.source = Source.open(model.folder)
    with pytest.raises(CheckpointError, match=r"must have a place .*Got model\.layers\.0\.adapter\.weight"):
        front.layout("gguf", model.source, model.deployment(lambda _: "q8_0"))
