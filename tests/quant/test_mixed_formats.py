"""Plans whose layers are stored in different families of formats."""

import pytest
import torch
from torch import nn

from quant.apply import ApplyError, fake_quantized, quantize_
from quant.formats import codec_of
from quant.inventory import take_inventory
from quant.plan import Certificate, Digests, PlanError, parse_plan, plan_json
from quant.planning import build_plan
from quant.schemes import parse_scheme

MIX = {"0": "w4", "1": "mxfp4", "2": "q4_k-rtn", "3": "nf4", "4": "bf16", "5": "fp8-tensor"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(5)), nn.Linear(256, 10)).to(torch.bfloat16)


def build(inventory, assignment):
    return build_plan(
        inventory, assignment, digests=Digests(), certificate=Certificate("optimal"), source="x"
    )


def test_every_layer_gets_the_weights_of_its_own_format(model):
    inventory = take_inventory(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = build(inventory, MIX)
    with fake_quantized(model, plan, inventory):
        for name, text in MIX.items():
            scheme = parse_scheme(text)
            codec = codec_of(scheme.weight)
            if scheme.weight.family != "integer":
                verb = codec.nearest if scheme.quantizer == "rtn" else codec.closest
                expected = codec.decode(verb(before[f"{name}.weight"], scheme.weight)).to(torch.bfloat16)
                assert torch.equal(model[int(name)].weight, expected), text
        changed = {name for name in MIX if not torch.equal(model[int(name)].weight, before[f"{name}.weight"])}
        assert changed == set(MIX) - {"4"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_plan_counts_the_packed_bytes_and_reads_back(model):
    inventory = take_inventory(model)
    plan = build(inventory, MIX)
    for name, text in MIX.items():
        fmt = parse_scheme(text).weight
        codec = codec_of(fmt)
        if fmt.family != "integer":
            assert (
                plan.layers[name].bytes == codec.pack(codec.nearest(model[int(name)].weight.data, fmt)).nbytes
            )
    assert plan.layers["2"].bytes == 256 * 144
    assert plan_json(parse_plan(plan_json(plan))) == plan_json(plan)
    assert plan.quantizers == {"mse_clip": 1, "rtn": 1}


def test_bf16_loses_nothing_on_a_bf16_model(model):
    inventory = take_inventory(model)
    inputs = torch.randn(3, 256, dtype=torch.bfloat16)
    before = model(inputs)
    plan = build(inventory, dict.fromkeys(MIX, "bf16"))
    assert plan.totals.bytes == sum(layer.stored_bytes for layer in inventory.layers)
    assert torch.equal(quantize_(model, plan, inventory)(inputs), before)


def test_refused_shapes_are_named_with_the_fallback():
    model = nn.Sequential(nn.Linear(96, 8))
    inventory = take_inventory(model)
    with pytest.raises(PlanError, match=r"Got q4_k for 0: 96 columns .* 256; llama.cpp would store q5_0"):
        build(inventory, {"0": "q4_k"})
    other = nn.Sequential(nn.Linear(100, 8))
    inventory = take_inventory(other)
    with pytest.raises(ApplyError, match="Got nvfp4 for 0: 100 columns are no multiple of 16"):
        quantize_(other, {"0": "nvfp4"}, inventory)
