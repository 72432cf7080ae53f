"""Fused experts as layers: told by their structure, seen as (experts * out, in), counted as they are used."""

import pytest
import torch
from torch import nn

from quant.apply import fake_quantized, parameter_of, quantize_, quantized_weight
from quant.experts import fused_projections, router_paths
from quant.inventory import take_inventory
from quant.ops import matrix_shape
from quant.schemes import parse_scheme

GATED = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text")
TRANSPOSED = ("gpt_oss", "llama4_text")
TOKENS = torch.arange(3, 33).reshape(3, 10)


@pytest.fixture(params=(*GATED, "nemotron_h"))
def model(request, tiny_experts):
    return tiny_experts(request.param)


def experts_in(inventory):
    return [layer for layer in inventory.layers if layer.experts > 1]


def test_every_projection_is_a_layer_with_the_input_as_its_columns(model):
    op = "experts_transposed" if model.config.model_type in TRANSPOSED else "experts"
    layers = experts_in(take_inventory(model))
    wide = 12 if model.config.model_type == "nemotron_h" else 24
    matrices = {layer.name.rpartition(".")[2]: layer.matrix for layer in layers}
    assert matrices in (
        {"gate_up_proj": (4 * wide, 16), "down_proj": (4 * 16, 12)},
        {"up_proj": (4 * wide, 16), "down_proj": (4 * 16, 12)},
    )
    assert {layer.op for layer in layers} == {op}
    assert {layer.role for layer in layers} == {"expert"}
    assert {layer.experts for layer in layers} == {4}
    for layer in layers:
        assert parameter_of(model, layer) is model.get_parameter(layer.name)


def test_only_routed_tokens_count(model):
    def run():
        with torch.no_grad():
            model(TOKENS)
        return len(TOKENS)

    chosen = getattr(model.config, "num_experts_per_tok", 1)
    for layer in experts_in(take_inventory(model, run=run)):
        assert layer.macs == TOKENS.shape[1] * chosen * layer.parameters // layer.experts, layer.name


def test_routers_keep_their_precision_unless_they_are_included(model):
    paths = router_paths(model)
    assert paths
    left_out = {item.name: item.reason for item in take_inventory(model).excluded}
    assert {left_out[path] for path in paths} == {
        "router of experts: left out by default; include it by pattern"
    }
    (path, *_) = sorted(paths)
    included = take_inventory(model, include=[path], run=lambda: len(model(TOKENS).logits)).by_name[path]
    assert (included.op, included.matrix) == ("linear", (4, 16))
    assert included.macs == TOKENS.shape[1] * 4 * 16


def test_biases_of_experts_are_no_weights(tiny_experts):
    names = {item.name for item in take_inventory(tiny_experts("gpt_oss")).excluded}
    assert not any(name.endswith("bias") for name in names)


@pytest.mark.parametrize("scheme", ["w4", "w3-g4-asym", "w8-tensor", "mxfp4", "nvfp4", "q4_0", "bf16"])
def test_each_expert_is_quantized_as_a_matrix_of_its_own_would_be(tiny_experts, scheme):
    model = tiny_experts("gpt_oss", hidden_size=32, intermediate_size=32)
    layer = experts_in(take_inventory(model))[0]
    weight = parameter_of(model, layer).detach()
    assert parse_scheme(scheme).refuses(layer) is None
    found = quantized_weight(weight, layer, scheme)
    assert found.shape == weight.shape
    assert not torch.equal(found, weight)
    if scheme not in ("w8-tensor", "nvfp4"):  # these have one scale for all experts
        alone = nn.Linear(32, 64, bias=False)
        for expert in range(4):
            alone.weight.data = weight[expert].t().contiguous()
            only = take_inventory(nn.Sequential(alone)).layers[0]
            assert torch.equal(quantized_weight(alone.weight, only, scheme), found[expert].t())


def test_applying_changes_the_outputs_and_gives_the_weights_back(model):
    inventory = take_inventory(model)
    plan = {layer.name: "w3" for layer in experts_in(inventory)}
    with torch.no_grad():
        before = model(TOKENS).logits
        with fake_quantized(model, plan, inventory):
            inside = model(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, before)
        assert not torch.equal(inside, before)
        quantize_(model, plan, inventory)
        assert torch.equal(model(TOKENS).logits, inside)


class Experts(nn.Module):
    def __init__(self, first, down, gated=True, transposed=None):
        super().__init__()
        self.register_parameter("gate_up_proj" if gated else "up_proj", nn.Parameter(torch.ones(first)))
        self.down_proj = nn.Parameter(torch.ones(down))
        if transposed is not None:
            self.is_transposed = transposed


@pytest.mark.parametrize(
    ("module", "op"),
    [
        (Experts((4, 6, 5), (4, 5, 3)), "experts"),
        (Experts((4, 5, 6), (4, 3, 5)), "experts_transposed"),
        (Experts((4, 6, 5), (4, 5, 3), transposed=False), "experts"),
        (Experts((4, 3, 5), (4, 5, 3), gated=False, transposed=False), "experts"),
        (Experts((4, 3, 5), (4, 5, 3), gated=False, transposed=True), "experts_transposed"),
        (Experts((4, 6, 5), (4, 5, 3), transposed=True), None),
        (Experts((4, 3, 5), (4, 5, 3), gated=False), None),
        (Experts((4, 6, 5), (3, 5, 3)), None),
        (Experts((4, 6, 5), (4, 5, 6)), None),
        (Experts((24, 5), (20, 3)), None),
    ],
)
def test_the_layout_is_proven_or_refused(module, op):
    assert set(fused_projections(module).values()) == ({op} if op else set())
    holder = nn.ModuleDict({"experts": module, "line": nn.Linear(3, 3)})
    inventory = take_inventory(holder)
    assert [layer.op for layer in inventory.layers if layer.name != "line"] == ([op, op] if op else [])
    if op is None and module.down_proj.ndim == 3:
        assert "whose layout is not certain" in inventory.excluded[0].reason


def test_the_matrix_of_either_layout_is_the_same():
    assert matrix_shape((4, 24, 16), "experts") == matrix_shape((4, 16, 24), "experts_transposed")


def test_a_linear_beside_experts_is_a_router_only_by_name_and_width():
    block = nn.ModuleDict(
        {
            "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4)),
            "gate": nn.Linear(8, 4),
            "gate_proj": nn.Linear(8, 4),
            "shared_gate": nn.Linear(8, 1),
        }
    )
    assert router_paths(nn.ModuleDict({"mlp": block})) == {"mlp.gate"}
