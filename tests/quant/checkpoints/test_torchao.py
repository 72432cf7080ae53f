"""Folders with torchao's tensors: what transformers loads and computes from them."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaForCausalLM

from quant.apply import fake_quantized, quantized_weight
from quant.checkpoints import front, torchao
from quant.checkpoints.loading import load_checkpoint
from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import Source
from quant.export import torchao as config
from quant.export.protocol import ExportRefused
from quant.inventory import take_inventory
from tests.deployments import deployment_of

MENU = [
    "w2-g16",
    "w3-asym",
    "w4-g32-asym-float32",
    "w5",
    "w8",
    "w8-g16",
    "fp8",
    "fp8-tensor",
    "w6-bfloat16",
    None,
]
KINDS = {"llama": LlamaForCausalLM, "bert": BertModel}
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(4))


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS)[0].float()


def simulated(model, deployment, inventory):
    with fake_quantized(model, deployment.plan, inventory):
        return logits(model)


@pytest.mark.parametrize(("name", "seed"), [("llama", 0), ("llama", 1), ("bert", 2), ("bert", 3)])
def test_transformers_loads_what_was_measured(name, seed, saved, deployed, tmp_path):
    folder = saved(name)
    model = KINDS[name].from_pretrained(folder).eval()
    source, deployment, inventory = deployed(folder, model, MENU, seed)
    front.write("torchao", source, deployment, tmp_path / "out")
    loaded = KINDS[name].from_pretrained(tmp_path / "out").eval()
    found = {m.name: config._facts(loaded.get_submodule(m.name)) for m in deployment.model.modules}
    assert found == deployment.expected
    assert any(type(p).__name__ == "IntxUnpackedToInt8Tensor" for p in loaded.parameters())
    for path in deployment.quantized:
        weight = loaded.get_submodule(path).weight.dequantize()
        own = model.get_submodule(path).weight
        assert torch.equal(
            weight, quantized_weight(own, inventory.by_name[path], deployment.schemes[path])
        ), path
    expected = simulated(model, deployment, inventory)
    assert torch.allclose(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(load_checkpoint(tmp_path / "out").model), expected)


def test_a_16_bit_model_in_several_files(saved, deployed, tmp_path):
    folder = saved("llama", torch.bfloat16, max_shard_size="60KB")
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()
    source, deployment, inventory = deployed(folder, model, ["w4-g32-asym", "w8", "fp8-tensor", "w3"], 5)
    layout = front.write("torchao", source, deployment, tmp_path / "out").layout
    assert sum(file.name.endswith(".safetensors") for file in layout.files) > 1
    for path, weight in torchao.read_back(tmp_path / "out", deployment):
        own = model.get_submodule(path).weight.float()
        assert torch.equal(
            weight, quantized_weight(own, inventory.by_name[path], deployment.schemes[path])
        ), path
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    expected = simulated(model, deployment, inventory)
    assert float((logits(loaded) - expected).norm() / expected.norm()) < 0.02


def deploy(folder, model, assignment, facts=None):
    source = Source.open(folder)
    inventory = take_inventory(model, include=list(assignment))
    kept = [layer.name for layer in inventory.layers if layer.name not in assignment]
    inventory = take_inventory(model, include=list(assignment), exclude=kept)
    return source, deployment_of(source, inventory, assignment, take_inventory(model)), inventory


def test_embeddings_and_heads_are_loaded_too(saved, tmp_path):
    folder = saved("llama")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    assignment = {"model.embed_tokens": "w8", "lm_head": "w8", "model.layers.0.mlp.up_proj": "w4-g16"}
    source, deployment, inventory = deploy(folder, model, assignment)
    front.write("torchao", source, deployment, tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded.lm_head.weight).__name__ == "Int8Tensor"
    assert type(loaded.model.embed_tokens.weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert torch.allclose(logits(loaded), simulated(model, deployment, inventory), rtol=1e-4, atol=1e-4)


def test_inputs_are_rounded_where_the_plan_says_so(saved, tmp_path):
    folder = saved("llama")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    path = "model.layers.1.mlp.down_proj"
    source, deployment, inventory = deploy(folder, model, {path: "w8-aint8"})
    front.write("torchao", source, deployment, tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    layer, inputs = loaded.get_submodule(path), torch.randn(5, 96)
    weight = quantized_weight(model.get_submodule(path).weight, inventory.by_name[path], "w8")
    steps = inputs.abs().amax(dim=1, keepdim=True) / 127.5
    expected = (inputs / steps).round().clamp(-128, 127) * steps @ weight.T
    assert torch.allclose(layer(inputs), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(inputs), inputs @ weight.T, rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_class_is_refused(tmp_path):
    sides = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=32, **sides)).save_pretrained(tmp_path / "bert")
    model = BertModel.from_pretrained(tmp_path / "bert")
    source, deployment, _ = deploy(tmp_path / "bert", model, {"encoder.layer.0.output.dense": "w4"})
    with pytest.raises(CheckpointError, match=r"named as the model names .* Got 'bert\.encoder"):
        front.layout("torchao", source, deployment)


def test_schemes_that_torchao_cannot_hold_are_refused(saved):
    folder = saved("llama")
    model = LlamaForCausalLM.from_pretrained(folder)
    path = "model.layers.0.mlp.up_proj"
    for scheme in ("w4-tensor", "nvfp4", "w4-g48", "w8-g32-aint8", "w8-aint8s", "fp8-afp8"):
        source, deployment, _ = deploy(folder, model, {path: scheme})
        with pytest.raises(ExportRefused, match=rf"{path}: .* Got {scheme}"):
            front.layout("torchao", source, deployment)
