import json
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from quant.apply import fake_quantized
from quant.checkpoints.front import apply_plan
from quant.checkpoints.loading import load_checkpoint
from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import Source
from quant.inventory import take_inventory
from tests.deployments import plan_of


@pytest.fixture
def applied(saved, deployed, tmp_path):
    folder = saved("llama")
    model = LlamaForCausalLM.from_pretrained(folder)
    _, deployment, inventory = deployed(folder, model, ["w3", "w4-g32-asym", "nf4-g32"])
    apply_plan(folder, deployment.plan, tmp_path / "out")
    return tmp_path / "out", model, deployment.plan, inventory


def test_one_call_gives_the_model_and_its_plan(applied):
    folder, model, plan, inventory = applied
    loaded = load_checkpoint(folder)
    assert loaded.plan == plan
    assert not loaded.model.training
    found = loaded.model.state_dict()
    with fake_quantized(model, plan, inventory):
        for name, value in model.state_dict().items():
            assert torch.equal(found[name], value), name


def test_a_folder_that_was_not_written_here_is_refused(saved):
    with pytest.raises(
        CheckpointError, match=r"must hold bitplan_plan\.json.*Write it with bitplan checkpoint"
    ):
        load_checkpoint(saved("llama"))


def test_spoiled_folders_are_refused(applied, tmp_path):
    folder = applied[0]
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"auto_map": {"AutoModel": "x.y"}}, "must not hold auto_map"),
        ({"num_hidden_layers": 3}, r"Tensors must be those of LlamaForCausalLM\. Got model\.layers\.2\."),
    ):
        spoiled = shutil.copytree(folder, tmp_path / words[:4])
        (spoiled / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(spoiled)


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16))
    model.save_pretrained(tmp_path / "model")
    inventory = take_inventory(model, include=["lm_head"])
    assignment = {layer.name: "w4" for layer in inventory.layers}
    plan = plan_of(inventory, assignment, model=Source.open(tmp_path / "model").digest)
    apply_plan(tmp_path / "model", plan, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out").model
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with fake_quantized(model, plan, inventory):
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
