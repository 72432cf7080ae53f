"""Fused experts in exports: named as consumers know them, or refused with the rule."""

import json
import random

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from transformers import MixtralConfig, Qwen3MoeConfig

from quant.catalog import EXPORTERS
from quant.export import llm_compressor, vllm
from quant.export.front import export, lint
from quant.export.protocol import Deployment, ModelFacts
from quant.layers import Excluded, Inventory, Layer
from quant.ops import matrix_shape
from quant.plan import Certificate, Digests
from quant.planning import build_plan

QWEN = Qwen3MoeConfig(num_experts=6, num_hidden_layers=2).to_dict()
MENU = ("w4", "w8", "w4-g32", "w8-g128", "w4-g128")


def layer(name, shape, op="linear"):
    size = torch.Size(shape).numel()
    return Layer(name, op, shape, matrix_shape(shape, op), size, None, "other", (), "float32")


def model(op="experts"):
    layers = []
    for block in range(2):
        base = f"model.layers.{block}"
        wide, down = ((6, 256, 128), (6, 128, 128)) if op == "experts" else ((6, 128, 256), (6, 128, 128))
        layers += [
            layer(f"{base}.self_attn.o_proj", (128, 128)),
            layer(f"{base}.mlp.experts.gate_up_proj", wide, op),
            layer(f"{base}.mlp.experts.down_proj", down, op),
        ]
    router = Excluded("model.layers.0.mlp.gate", "linear", 768, "router")
    kept = (Excluded("model.layers.2.mlp.experts.gate_up_proj", "experts", 9, "excluded"), router)
    return Inventory(tuple(layers), kept, 10**7, 1000)


def deployment(assign, inventory=None, config=QWEN):
    inventory = inventory or model()
    plan = build_plan(
        inventory,
        {item.name: assign(item.name) for item in inventory.layers},
        digests=Digests(),
        certificate=Certificate("feasible"),
        source="test",
    )
    return Deployment(plan, ModelFacts.of(inventory, config))


def random_plan(seed):
    chance = random.Random(seed)
    blocks = [chance.choice(MENU) for _ in range(2)]
    return lambda name: blocks[int(name.split(".")[2])] if "experts" in name else chance.choice(MENU)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("consumer", "module"), [("vllm", vllm), ("llm-compressor", llm_compressor)])
def test_random_plans_read_back_for_every_expert(consumer, module, seed):
    found = deployment(random_plan(seed))
    assert lint(consumer, found) == ()
    assert module.read_back(export(consumer, found), found.model) == found.expected


def test_every_expert_is_named_where_it_is_quantized_and_where_it_is_not():
    found = deployment(lambda name: "w4" if ".0." in name else "w8")
    config = json.loads(export("vllm", found)["config.json"])["quantization_config"]
    named = {name for group in config["config_groups"].values() for name in group["targets"]}
    for expert in range(6):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.1.mlp.experts.{expert}.{projection}" in named
    assert "model.layers.1.mlp.experts.6.gate_proj" not in named
    assert set(config["ignore"]) == {
        "model.layers.0.mlp.gate",
        *(f"model.layers.2.mlp.experts.{n}.{p}_proj" for n in range(6) for p in ("gate", "up")),
    }


def test_blocks_that_consumers_know_by_another_name():
    config = MixtralConfig(num_local_experts=6, num_hidden_layers=2).to_dict()
    found = deployment(lambda name: "w4", config=config)
    assert found.model.linears["model.layers.0.mlp.experts.down_proj"][:2] == (
        "model.layers.0.block_sparse_moe.experts.0.down_proj",
        "model.layers.0.block_sparse_moe.experts.1.down_proj",
    )
    assert vllm.read_back(export("vllm", found), found.model) == found.expected


@pytest.mark.parametrize("scheme", ["w4", "w8-g32"])
def test_stored_bytes_are_those_of_packed_experts(scheme):
    inventory = model()
    only = Inventory(inventory.layers[1:3], (), 10**7, 1000)
    bits, groups = (4, 1) if scheme == "w4" else (8, 4)
    stored = 0
    for rows in (128, 128, 128):  # gate, up, down
        packed = pack_to_int32(torch.zeros(rows, 128, dtype=torch.int8), bits)
        stored += 6 * (packed.nbytes + rows * groups * 2 + 16)
    assert vllm.stored_bytes(deployment(lambda name: scheme, only)) == stored


@pytest.mark.parametrize(
    ("assign", "inventory", "config", "rule"),
    [
        (lambda name: "w4" if "down" in name else "w8", model(), QWEN, "loaded as one matrix"),
        (lambda name: "w3", model(), QWEN, "of experts, symmetric weights must have a width of 4, 8"),
        (lambda name: "w4-asym", model(), QWEN, "of experts, asymmetric weights must have a width of none"),
        (lambda name: "fp8", model(), QWEN, "of experts, weights must be int"),
        (lambda name: "w4", model("experts_transposed"), QWEN, "a experts_transposed module"),
        (
            lambda name: "w4",
            model(),
            {"model_type": "test"},
            "config.json must say how many experts there are",
        ),
    ],
)
def test_what_cannot_be_expressed_is_named(assign, inventory, config, rule):
    found = lint("vllm", deployment(assign, inventory, config))
    assert any(rule in str(violation) for violation in found)
    assert all("experts" in violation.layer for violation in found)


@pytest.mark.parametrize("consumer", [name for name in EXPORTERS if name not in ("vllm", "llm-compressor")])
def test_other_consumers_take_experts_or_name_the_rule(consumer):
    schemes = {"llama.cpp": "q8_0", "mlx": "w4-g32-asym", "torchao": "w4", "modelopt": "w4-g128"}
    found = lint(consumer, deployment(lambda name: schemes.get(consumer, "w4-g32-asym")))
    experts = [violation for violation in found if "experts" in violation.layer]
    assert consumer == "llama.cpp" or {violation.rule.split()[0] for violation in experts} >= {"only"}
