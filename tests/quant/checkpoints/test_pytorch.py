import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from quant.apply import NonFinite, fake_quantized
from quant.checkpoints.front import apply_plan
from quant.checkpoints.protocol import CheckpointError
from quant.digest import folder_digest
from quant.inventory import take_inventory
from quant.plan import Certificate, Digests, parse_plan
from quant.planning import build_plan
from quant.safetensors_header import read_header


def plan_for(folder, model, include=(), schemes=("w2", "w4-g8", "w3-asym")):
    inventory = take_inventory(model, include=include)
    assignment = {layer.name: schemes[at % len(schemes)] for at, layer in enumerate(inventory.layers)}
    digests = Digests(model=folder_digest(folder)[0])
    plan = build_plan(
        inventory, assignment, digests=digests, certificate=Certificate("feasible"), source="test"
    )
    return plan, inventory


def quantized_state(model, plan, inventory):
    with fake_quantized(model, plan, inventory):
        return {name: value.clone() for name, value in model.state_dict().items()}


def assert_loads_as(expected, folder, kind):
    loaded = kind.from_pretrained(folder).state_dict()
    assert set(loaded) == set(expected)
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name


@pytest.fixture
def llama(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama").folder, folder)
    return folder


def test_the_checkpoint_loads_with_the_weights_that_were_measured(llama, tmp_path):
    model = LlamaForCausalLM.from_pretrained(llama)
    plan, inventory = plan_for(llama, model)
    out = tmp_path / "out"
    found = apply_plan(llama, plan, out)
    assert_loads_as(quantized_state(model, plan, inventory), out, LlamaForCausalLM)
    assert found.provenance.tensors == len(plan.layers)
    assert parse_plan((out / "bitplan_plan.json").read_text()).digest == plan.digest
    provenance = json.loads((out / "bitplan_provenance.json").read_text())
    assert provenance["model"] == plan.digests.model
    assert provenance["forced"] is False
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert not (out / "text.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_types_and_metadata_are_kept(llama, tmp_path, dtype):
    source = tmp_path / "sharded"
    model = LlamaForCausalLM.from_pretrained(llama).to(dtype)
    model.save_pretrained(source, max_shard_size="4KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 2
    plan, inventory = plan_for(source, model)
    apply_plan(source, plan, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    for name in shards:
        before, after = read_header(source / name), read_header(tmp_path / "out" / name)
        assert before == after
        assert before.metadata == {"format": "pt"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    for name, value in quantized_state(model, plan, inventory).items():
        assert torch.equal(loaded[name], value), name


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16)
    return GPT2LMHeadModel(config)


def test_tied_weights_and_transposed_layers(tmp_path):
    source = tmp_path / "gpt2"
    model = gpt2()
    model.save_pretrained(source)
    plan, inventory = plan_for(source, model, include=["lm_head"])
    assert plan.layers["transformer.wte"].aliases == ("lm_head",)
    assert plan.layers["transformer.h.0.mlp.c_fc"].matrix == (64, 16)
    apply_plan(source, plan, tmp_path / "out")
    assert_loads_as(quantized_state(model, plan, inventory), tmp_path / "out", GPT2LMHeadModel)


def test_tied_weights_stored_under_both_names_change_together(tmp_path):
    source = tmp_path / "gpt2"
    model = gpt2()
    model.save_pretrained(source)
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored["transformer.wte.weight"].clone()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    plan, _ = plan_for(source, model, include=["lm_head"])
    found = apply_plan(source, plan, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert found.provenance.tensors == len(plan.layers) + 1
    assert torch.equal(written["lm_head.weight"], written["transformer.wte.weight"])
    assert not torch.equal(written["lm_head.weight"], stored["lm_head.weight"])


def test_a_checkpoint_with_another_prefix(tiny, tmp_path):
    source = tmp_path / "bert"
    shutil.copytree(tiny("bert").folder, source)
    stored = load_file(source / "model.safetensors")
    renamed = {f"bert.{name}": value for name, value in stored.items()}
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    model = BertModel.from_pretrained(tiny("bert").folder)
    plan, inventory = plan_for(source, model)
    apply_plan(source, plan, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = quantized_state(model, plan, inventory)
    for name in plan.layers:
        assert torch.equal(written[f"bert.{name}.weight"], expected[f"{name}.weight"])
    assert torch.equal(
        written["bert.encoder.layer.0.output.dense.bias"], stored["encoder.layer.0.output.dense.bias"]
    )


def test_another_model_is_refused_unless_forced(llama, tmp_path):
    plan, _ = plan_for(llama, LlamaForCausalLM.from_pretrained(llama))
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "bos_token_id": 2}))
    with pytest.raises(CheckpointError, match=r"must be made for this model.*Pass the plan's own model"):
        apply_plan(llama, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert apply_plan(llama, plan, tmp_path / "out", force=True).provenance.forced
    provenance = json.loads((tmp_path / "out" / "bitplan_provenance.json").read_text())
    assert provenance["forced"] is True
    assert "must be made for this model" in provenance["mismatches"][0]


def test_another_quantizer_version_is_refused(llama, tmp_path):
    plan, _ = plan_for(llama, LlamaForCausalLM.from_pretrained(llama))
    with pytest.raises(CheckpointError, match="quantizer mse_clip version 1. Got version 7"):
        apply_plan(llama, replace(plan, quantizers={"mse_clip": 7}), tmp_path / "out")
    with pytest.raises(CheckpointError, match="quantizer nosuch version None. Got version 1"):
        apply_plan(llama, replace(plan, quantizers={"nosuch": 1}), tmp_path / "out")


def test_layers_must_be_in_the_checkpoint(llama, tmp_path):
    plan, _ = plan_for(llama, LlamaForCausalLM.from_pretrained(llama))
    first, layer = next(iter(plan.layers.items()))
    gone = replace(plan, layers={**plan.layers, "model.layers.9.mlp.up_proj": layer})
    with pytest.raises(CheckpointError, match=r"Got none for model\.layers\.9\.mlp\.up_proj \(1 in all\)"):
        apply_plan(llama, gone, tmp_path / "out")
    other = replace(plan, layers={first: replace(layer, shape=(3, 3))})
    with pytest.raises(CheckpointError, match=r"must have the shape \(3, 3\)"):
        apply_plan(llama, other, tmp_path / "out")


def test_plans_that_round_inputs_store_the_same_weights(llama, tmp_path):
    model = LlamaForCausalLM.from_pretrained(llama)
    rounding, _ = plan_for(llama, model, schemes=("w4", "w8-aint8"))
    apply_plan(llama, rounding, tmp_path / "out")
    plain, inventory = plan_for(llama, model, schemes=("w4", "w8"))
    assert_loads_as(quantized_state(model, plain, inventory), tmp_path / "out", LlamaForCausalLM)
    written = parse_plan((tmp_path / "out" / "bitplan_plan.json").read_text())
    assert set(written.assignment.values()) == {"w4", "w8-aint8"}


def test_the_output_must_be_free(llama, tmp_path):
    plan, _ = plan_for(llama, LlamaForCausalLM.from_pretrained(llama))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="must be new or empty"):
        apply_plan(llama, plan, out)
    with pytest.raises(CheckpointError, match="must be new or empty"):
        apply_plan(llama, plan, llama, force=True)
    (out / "mine.txt").unlink()
    apply_plan(llama, plan, out)
    assert (out / "config.json").exists()


def test_nothing_is_left_when_a_weight_is_not_finite(llama, tmp_path):
    plan, _ = plan_for(llama, LlamaForCausalLM.from_pretrained(llama))
    stored = load_file(llama / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=r"layer 'model\.layers\.1\.mlp\.up_proj'"):
        apply_plan(llama, plan, tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
