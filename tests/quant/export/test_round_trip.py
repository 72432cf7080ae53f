"""Random plans come back from the consumer's own parser module by module."""

import json
import random
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.catalog import EXPORTERS
from quant.export import auto_round, llm_compressor, mlx, modelopt, onnxruntime, torchao, vllm
from quant.export.front import export, lint
from quant.export.protocol import Deployment, ExportError, ExportRefused, ModelFacts, Module
from quant.layers import Excluded, Inventory, Layer
from quant.plan import Certificate, Digests
from quant.planning import build_plan

VLLM_MENU = ["w2", "w3-g32", "w4", "w4-g128", "w4-g32-asym", "w5", "w6-g64", "w8", "w8-asym"]
VLLM_MENU += ["fp8", "fp8-bfloat16", "nvfp4", "mxfp4", "w8-aint8", "w8-aint8s", "w4-g128-aint8", "w3-aint4"]
VLLM_MENU += ["fp8-afp8", "fp8-afp8s", "nvfp4-anvfp4s", "mxfp8-amxfp8"]
MLX_MENU = ["w2-g32-asym", "w3-g64-asym", "w4-g128-asym", "w5-g32-asym", "w6-g64-asym", "w8-g32-asym"]
MLX_MENU += ["mxfp4", "mxfp8"]
AO_MENU = [
    "w2",
    "w3-g32",
    "w4-g32-asym",
    "w5-asym",
    "w6-g64-bfloat16",
    "w7",
    "w8",
    "w8-g16",
    "fp8",
    "fp8-tensor",
]
ORT_MENU = ["w4-g16", "w4-g32-asym", "w4-g64-asym", "w8-g64", "w8-g128-asym", "w4-g128", "w8-g32"]
ROUND_MENU = ["w2", "w3-g32", "w4-g128", "w4-g16-asym", "w5-g64", "w6-asym", "w7-g32", "w8", "w8-g128"]
OPT_MENU = [
    "w8",
    "w4-g128",
    "w4-g64",
    "fp8-tensor-afp8s",
    "fp8-afp8",
    "nvfp4",
    "nvfp4-anvfp4s",
    "mxfp8-amxfp8",
]
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CASES = [("vllm", vllm, VLLM_MENU), ("llm-compressor", llm_compressor, VLLM_MENU), ("mlx", mlx, MLX_MENU)]
CASES += [("auto-round", auto_round, ROUND_MENU), ("modelopt", modelopt, OPT_MENU)]
CASES += [("torchao", torchao, AO_MENU), ("onnxruntime", onnxruntime, ORT_MENU)]


@pytest.mark.parametrize(("consumer", "module", "menu"), CASES, ids=[case[0] for case in CASES])
@quick
@given(seed=st.integers(0, 10**6))
def test_random_plans_read_back_as_planned(consumer, module, menu, language_model, random_deployment, seed):
    found = random_deployment(language_model, menu, seed)
    assert lint(consumer, found) == ()
    assert module.read_back(export(consumer, found), found.model) == found.expected


BROKEN = ["w4-tensor", "w8-tensor", "nf4", "fp4", "fp8-e5m2", "w8-afp8"]


@pytest.mark.parametrize(("consumer", "module", "menu"), CASES, ids=[case[0] for case in CASES])
@quick
@given(seed=st.integers(0, 10**6))
def test_random_violations_are_refused_with_layer_and_rule(
    consumer, module, menu, language_model, random_deployment, deploy, seed
):
    chance = random.Random(seed)
    fine = random_deployment(language_model, menu, seed)
    alone = [name for name in fine.quantized if name.endswith(("o_proj", "down_proj", "dense"))]
    if not alone:
        return
    broken = {name: chance.choice(BROKEN) for name in chance.sample(alone, chance.randint(1, len(alone)))}
    kept = {layer.name for layer in language_model.layers} - set(fine.quantized)
    found = deploy(language_model, fine.plan.assignment | broken, kept)
    with pytest.raises(ExportRefused) as refusal:
        export(consumer, found)
    assert {item.layer: item.got for item in refusal.value.violations} == broken
    assert all(item.rule for item in refusal.value.violations)


@pytest.mark.parametrize(("consumer", "module", "menu"), CASES, ids=[case[0] for case in CASES])
def test_linear_layers_of_a_cnn_read_back_and_its_convolutions_are_refused(
    consumer, module, menu, inventories, deploy
):
    for scheme in menu:
        found = deploy(inventories["cnn"], {"head": scheme}, kept=("stem", "block.conv"))
        assert module.read_back(export(consumer, found), found.model) == found.expected
    convolutions = deploy(inventories["cnn"], {"stem": "w4", "block.conv": "w4", "head": menu[0]})
    layers = {item.layer for item in lint(consumer, convolutions)}
    assert layers == {"stem", "block.conv"}


def test_vllm_groups_are_numbered_and_every_module_is_named(inventories, random_deployment):
    found = random_deployment(inventories["llama"], VLLM_MENU, 5)
    config = json.loads(export("vllm", found)["config.json"])
    groups = config["quantization_config"]["config_groups"]
    assert list(groups) == [f"group_{n}" for n in range(len(groups))]
    named = [name for group in groups.values() for name in group["targets"]]
    named += config["quantization_config"]["ignore"]
    assert sorted(named) == sorted(module.name for module in found.model.modules)
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert config["model_type"] == "test"


@pytest.mark.parametrize("consumer", [name for name in EXPORTERS if name != "llama.cpp"])
def test_convolutions_are_refused_by_name(consumer, inventories, deploy):
    found = deploy(inventories["cnn"], {"stem": "w4", "block.conv": "w4", "head": "w4-g64-asym"})
    with pytest.raises(ExportRefused, match=r"stem: only linear.* Got a conv2d module"):
        export(consumer, found)


def test_linear_layers_of_a_cnn_alone_are_taken(inventories, deploy):
    found = deploy(inventories["cnn"], {"head": "w4"}, kept=("stem", "block.conv"))
    assert vllm.read_back(export("vllm", found), found.model) == found.expected


def test_fused_siblings_that_differ_are_refused(inventories, deploy):
    assignment = {layer.name: "w4" for layer in inventories["llama"].layers}
    assignment["model.layers.1.self_attn.k_proj"] = "w8"
    violations = lint("vllm", deploy(inventories["llama"], assignment))
    assert [item.layer for item in violations] == ["model.layers.1.self_attn.q_proj"]
    assert "loaded as one matrix with model.layers.1.self_attn.k_proj" in violations[0].rule
    assert violations[0].got == "w4, w8, w4"


def test_fused_floats_with_one_scale_per_tensor_are_refused(inventories, deploy):
    assignment = {layer.name: "fp8-tensor" for layer in inventories["llama"].layers}
    layers = {item.layer for item in lint("vllm", deploy(inventories["llama"], assignment))}
    assert layers == {name for name in assignment if not name.endswith(("o_proj", "down_proj"))}


def test_a_fused_sibling_that_keeps_its_precision_is_refused(inventories, deploy):
    kept = ("model.layers.0.mlp.up_proj",)
    assignment = {layer.name: "w4" for layer in inventories["llama"].layers if layer.name not in kept}
    violations = lint("vllm", deploy(inventories["llama"], assignment, kept))
    assert [item.got for item in violations] == ["w4, full precision"]


@pytest.mark.parametrize(
    ("consumer", "scheme", "rule"),
    [
        ("vllm", "w3-asym", "asymmetric weights must have a width of 4, 8 bits"),
        ("vllm", "w4-g48", "scales must be one per channel, groups of 32"),
        ("vllm", "w4-tensor", "scales must be one per channel"),
        ("vllm", "fp8-g32", "scales must be one per channel, one per tensor"),
        ("vllm", "fp8-e5m2", "weights must be int, fp8_e4m3, nvfp4, mxfp4, mxfp8"),
        ("vllm", "mxfp8", "activations of mxfp8 weights must be mxfp8"),
        ("vllm", "nvfp4-anvfp4", "activations of nvfp4 weights must be left alone, nvfp4s"),
        ("vllm", "w8-g32-aint8s", "scales must be one per channel, one per tensor"),
        ("vllm", "w8-aint4", "symmetric weights must have a width of 2, 3, 4 bits"),
        ("vllm", "w4-asym-aint8", "asymmetric weights must have a width of none bits"),
        ("vllm", "w8-afp8", "activations of int weights must be left alone, int8, int8s, int4"),
        ("vllm", "q4_0", "weights must be int"),
        ("mlx", "nvfp4", "weights must be int, mxfp4, mxfp8"),
        ("mlx", "w4-g32-asym-aint8", "activations of int weights must be left alone"),
        ("mlx", "w4-g64", "symmetric weights must have a width of none bits"),
        ("mlx", "w7-g64-asym", "asymmetric weights must have a width of 2, 3, 4, 5, 6, 8 bits"),
        ("mlx", "w4-asym", "scales must be groups of 32"),
        ("torchao", "w4-tensor", "scales must be one per channel, one per group"),
        ("torchao", "w4-g48", "the group size must divide the 128 columns"),
        ("gptqmodel", "w4-tensor", "scales must be one per channel, groups of 16"),
        ("gptqmodel", "w4-g24", "scales must be one per channel, groups of 16"),
        ("gptqmodel", "w4", "only modules of the model's repeated blocks and lm_head can be quantized"),
        ("auto-round", "w4-aint8", "activations of int weights must be left alone"),
        ("auto-round", "mxfp4", "weights must be int"),
        ("auto-round", "w8-asym", "asymmetric weights must have a width of 2, 3, 4, 5, 6, 7 bits"),
        ("modelopt", "w4", "scales must be groups of 64, groups of 128"),
        ("modelopt", "w8-aint8", "activations of int weights must be left alone"),
        ("modelopt", "fp8", "activations of fp8_e4m3 weights must be fp8s, fp8"),
        ("modelopt", "fp8-tensor-afp8", "scales must be one per channel"),
        ("torchao", "nf4", "weights must be int, fp8_e4m3"),
        ("onnxruntime", "w3-g32", "symmetric weights must have a width of 4, 8 bits"),
        ("onnxruntime", "w4-g8", "scales must be groups of 16"),
        ("onnxruntime", "w4-g128-asym", "4-bit weights with zero points need an even number of groups"),
    ],
)
def test_rules(consumer, scheme, rule, inventories, deploy):
    found = deploy(inventories["cnn"], {"head": scheme}, kept=("stem", "block.conv"))
    with pytest.raises(ExportRefused, match=rf"head: {rule}.*Got {scheme}\."):
        export(consumer, found)


def test_one_recipe_has_one_quantizer(inventories, deploy):
    assignment = {layer.name: "w4" for layer in inventories["llama"].layers}
    assignment["model.layers.2.mlp.down_proj"] = "w4-rtn"
    violations = lint("llm-compressor", deploy(inventories["llama"], assignment))
    assert [(item.layer, item.got) for item in violations] == [("model.layers.2.mlp.down_proj", "rtn")]


def test_gptq_becomes_the_modifier_of_that_name(inventories, deploy):
    import yaml

    assignment = {layer.name: "w4-g128-gptq" for layer in inventories["llama"].layers}
    found = deploy(inventories["llama"], assignment)
    files = export("llm-compressor", found)
    (modifier,) = yaml.safe_load(files["recipe.yaml"])["quant_stage"]["quant_modifiers"]
    assert modifier == "GPTQModifier"
    assert llm_compressor.read_back(files, found.model) == found.expected


def test_a_missing_library_is_named(inventories, deploy, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    found = deploy(inventories["cnn"], {"head": "w4"}, kept=("stem", "block.conv"))
    with pytest.raises(
        ExportError, match=r"Exporting to torchao must have its library\. Got no module 'torchao"
    ):
        export("torchao", found)


@pytest.mark.parametrize("scheme", AO_MENU)
def test_bytes_in_torchao_are_those_of_its_tensors(scheme, inventories, deploy):
    import torch
    from torchao.quantization import quantize_
    from transformers import TorchAoConfig

    found = deploy(inventories["cnn"], {"head": scheme}, kept=("stem", "block.conv"))
    model = torch.nn.Module()
    model.head = torch.nn.Linear(128, 128, bias=False)
    config = torchao.quantization_config(found)
    config.pop("quant_method")
    quantize_(model, TorchAoConfig.from_dict(config).quant_type, filter_fn=None)
    weight = model.head.weight
    names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ())]
    stored = [getattr(weight, name) for name in names]
    assert torchao.stored_bytes(found) == sum(tensor.nbytes for tensor in stored if tensor is not None)


@pytest.mark.parametrize("scheme", ORT_MENU)
def test_bytes_in_onnxruntime_are_those_of_the_node(scheme, deploy):
    from onnx import numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, RTNWeightOnlyQuantConfig

    layer = Layer("fc", "linear", (8, 1024), (8, 1024), 8192, None, "other", (), "float32")
    found = deploy(Inventory((layer,), (), 10**5, 0), {"fc": scheme})
    config = json.loads(onnxruntime.files(found)[onnxruntime.FILE])
    quantizer = MatMulNBitsQuantizer(
        onnxruntime._stand_in(["fc"]),
        algo_config=RTNWeightOnlyQuantConfig(customized_weight_config=config["customized_weight_config"]),
    )
    quantizer.process()
    graph = quantizer.model.model.graph
    stored = [item for item in graph.initializer if item.name in graph.node[0].input]
    assert onnxruntime.stored_bytes(found) == sum(numpy_helper.to_array(item).nbytes for item in stored)


def test_onnxruntime_leaves_out_what_the_plan_keeps(inventories, deploy):
    assignment = {layer.name: "w8-g32" for layer in inventories["llama"].layers}
    config = json.loads(export("onnxruntime", deploy(inventories["llama"], assignment))[onnxruntime.FILE])
    assert config["nodes_to_exclude"] == ["/model/embed_tokens/MatMul", "/lm_head/MatMul"]
    assert len(config["customized_weight_config"]) == len(assignment)


@pytest.mark.parametrize(("consumer", "module", "menu"), CASES, ids=[case[0] for case in CASES])
def test_a_head_that_shares_a_kept_embedding_is_left_alone_by_name(consumer, module, menu, inventories):
    tied = Excluded("model.embed_tokens", "embedding", 640, "left out", ("lm_head",))
    inventory = replace(inventories["llama"], excluded=(tied,))
    plan = build_plan(
        inventory,
        {layer.name: menu[2] for layer in inventory.layers},
        digests=Digests(),
        certificate=Certificate("feasible"),
        source="test",
    )
    found = Deployment(plan, ModelFacts.of(inventory, {}))
    assert found.expected["lm_head"] is None
    files = export(consumer, found)
    assert module.read_back(files, found.model) == found.expected
    assert b"lm_head" in b"".join(files.values())


@pytest.mark.parametrize(
    ("consumer", "place"),
    [
        ("gptqmodel", lambda files: json.loads(files["quantize_config.json"])["dynamic"]),
        ("auto-round", lambda files: json.loads(files["layer_config.json"])),
        (
            "modelopt",
            lambda files: json.loads(files["hf_quant_config.json"])["quantization"]["exclude_modules"],
        ),
    ],
)
def test_fused_experts_that_are_kept_are_named_one_by_one(consumer, place, inventories):
    experts = Excluded("model.layers.0.mlp.experts.gate_up_proj", "experts", 640, "left out")
    inventory = replace(inventories["llama"], excluded=(experts,))
    plan = build_plan(
        inventory,
        {layer.name: "w4-g128" for layer in inventory.layers},
        digests=Digests(),
        certificate=Certificate("feasible"),
        source="test",
    )
    found = Deployment(plan, ModelFacts.of(inventory, MIXTURE))
    named = [name.replace("\\", "").strip("^$-:") for name in place(export(consumer, found))]
    wanted = {f"model.layers.0.mlp.experts.{n}.{part}_proj" for n in range(2) for part in ("gate", "up")}
    assert wanted <= set(named)
    if consumer != "gptqmodel":
        module = EXPORTERS[consumer].load()
        assert module.read_back(export(consumer, found), found.model) == found.expected


MIXTURE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_size": 128,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}


def test_a_shared_weight_keeps_its_precision_in_torchao(deploy):
    shared = Layer(
        "embed", "embedding", (128, 128), (128, 128), 16384, None, "embedding", ("lm_head",), "float32"
    )
    violations = lint("torchao", deploy(Inventory((shared,), (), 10**5, 0), {"embed": "w8-g32"}))
    assert [item.layer for item in violations] == ["embed"]
    assert "several modules share" in violations[0].rule


def test_fp8_embeddings_are_refused_by_torchao(deploy):
    table = Layer("embed", "embedding", (128, 128), (128, 128), 16384, None, "embedding", (), "float32")
    violations = lint("torchao", deploy(Inventory((table,), (), 10**5, 0), {"embed": "fp8"}))
    assert [str(item) for item in violations] == [
        "embed: FP8 is for linear modules. Got an embedding module."
    ]


def test_a_plan_of_another_model_is_refused(inventories, deploy):
    found = deploy(inventories["cnn"], {"head": "w4"}, kept=("stem", "block.conv"))
    with pytest.raises(ExportError, match=r"Plan must name modules of the model\. Got head"):
        Deployment(found.plan, ModelFacts({}, (Module("other", "linear"),)))


def test_a_plan_for_other_shapes_is_refused(inventories, deploy):
    found = deploy(inventories["cnn"], {"head": "w4"}, kept=("stem", "block.conv"))
    with pytest.raises(
        ExportError, match=r"of the model's shapes\. Got \(128, 128\) for head, which is \(64, 128\)"
    ):
        Deployment(found.plan, ModelFacts({}, (Module("head", "linear", (64, 128)),)))


def test_an_unknown_consumer_is_refused(inventories, deploy):
    found = deploy(inventories["cnn"], {"head": "w4"}, kept=("stem", "block.conv"))
    with pytest.raises(ExportError, match=r"Consumer must be one of vllm.* Got 'tensorrt'"):
        export("tensorrt", found)


OWN_TYPE = {"dtype": "bfloat16"}


@pytest.mark.parametrize(("consumer", "module", "menu"), CASES, ids=[case[0] for case in CASES])
def test_layers_planned_in_the_models_own_type_are_left_alone(consumer, module, menu, inventories, deploy):
    assignment = {layer.name: menu[2] for layer in inventories["llama"].layers}
    alone = "model.layers.1.mlp.down_proj"
    plan = deploy(inventories["llama"], assignment | {alone: "bf16"})
    found = Deployment(plan.plan, ModelFacts(OWN_TYPE, plan.model.modules))
    assert found.expected[alone] is None
    assert module.read_back(export(consumer, found), found.model) == found.expected
    assert module.stored_bytes(found) == found.plan.layers[alone].bytes + sum(
        module.stored_bytes(deploy(inventories["llama"], {name: menu[2]}, set(assignment) - {name}))
        for name in assignment
        if name != alone
    )


@pytest.mark.parametrize("consumer", ["vllm", "llm-compressor", "mlx"])
def test_another_16_bit_type_than_the_models_is_refused(consumer, inventories, deploy):
    plan = deploy(inventories["cnn"], {"head": "fp16"}, kept=("stem", "block.conv"))
    found = Deployment(plan.plan, ModelFacts(OWN_TYPE, plan.model.modules))
    with pytest.raises(ExportRefused, match=r"head: weights must be int.*Got fp16\."):
        export(consumer, found)


def test_a_plan_that_quantizes_nothing_is_refused(inventories, deploy):
    plan = deploy(inventories["cnn"], {"head": "bf16"}, kept=("stem", "block.conv"))
    found = Deployment(plan.plan, ModelFacts(OWN_TYPE, plan.model.modules))
    with pytest.raises(ExportRefused, match=r"head: at least one module must be quantized"):
        export("vllm", found)
