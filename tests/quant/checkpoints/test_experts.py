"""Fused experts in checkpoints: stored fused or apart, what loads is what was measured."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralModel

from quant.apply import fake_quantized
from quant.checkpoints import vllm as packed
from quant.checkpoints.front import apply_plan, write
from quant.checkpoints.loading import load_checkpoint
from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import Source
from quant.digest import folder_digest
from quant.export import vllm
from quant.inventory import take_inventory
from tests.deployments import deployment_of, plan_of

TOKENS = torch.arange(3, 33).reshape(3, 10)
SCHEMES = ("w3", "w4-g4-asym", "w8-tensor", "w2")
FUSED = ("gpt_oss", "llama4_text")


def plan_for(folder, model, include=()):
    inventory = take_inventory(model, include=include)
    assignment = {layer.name: SCHEMES[at % 4] for at, layer in enumerate(inventory.layers)}
    return plan_of(inventory, assignment, model=folder_digest(folder)[0]), inventory


def assert_written_as_measured(folder, out, kind, include=()):
    model = kind.from_pretrained(folder, experts_implementation="eager").eval()
    plan, inventory = plan_for(folder, model, include)
    written = apply_plan(folder, plan, out)
    loaded = kind.from_pretrained(out, experts_implementation="eager").eval()
    with torch.no_grad(), fake_quantized(model, plan, inventory):
        for name, measured in model.named_parameters():
            assert torch.equal(measured, loaded.get_parameter(name)), name
        assert torch.equal(model(TOKENS)[0], loaded(TOKENS)[0])
    assert {path.name for path in out.iterdir()} >= {path.name for path in folder.glob("*.safetensors")}
    return written, plan


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_what_save_pretrained_wrote_loads_with_the_measured_weights(kind, tiny_experts, tmp_path):
    folder = tmp_path / "model"
    tiny_experts(kind).save_pretrained(folder, max_shard_size="9KB")
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    apart = {name for name in stored if ".experts.0." in name}
    assert bool(apart) == (kind not in FUSED)
    written, plan = assert_written_as_measured(folder, tmp_path / "out", AutoModelForCausalLM)
    fused = sum(layer.op.startswith("experts") for layer in plan.layers.values())
    # 4 experts: gate, up and down of a block are 12 stored tensors, and 2 layers
    assert written.provenance.tensors == len(plan.layers) + (0 if kind in FUSED else 5 * fused)


def test_experts_stored_fused_in_their_own_layout(tiny_experts, tmp_path):
    folder = tmp_path / "model"
    tiny_experts("mixtral").save_pretrained(folder, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(folder / "model.safetensors"))
    assert_written_as_measured(folder, tmp_path / "out", AutoModelForCausalLM)


def test_routers_that_are_stored_under_another_name(tiny_experts, tmp_path):
    folder = tmp_path / "model"
    tiny_experts("mixtral").save_pretrained(folder)
    _, plan = assert_written_as_measured(folder, tmp_path / "out", AutoModelForCausalLM, include=["*.gate"])
    assert "model.layers.0.mlp.gate" in plan.layers


def test_a_base_model_from_the_checkpoint_of_a_task_model(tiny_experts, tmp_path):
    folder = tmp_path / "model"
    tiny_experts("mixtral").save_pretrained(folder)
    assert_written_as_measured(folder, tmp_path / "out", MixtralModel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept(dtype, tiny_experts, tmp_path):
    folder = tmp_path / "model"
    tiny_experts("qwen3_moe").to(dtype).save_pretrained(folder)
    assert_written_as_measured(folder, tmp_path / "out", AutoModelForCausalLM)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_every_conversion_comes_apart_into_what_is_stored(tiny, tiny_experts):
    source = Source.open(tiny("mixtral").folder)
    stored = {
        name: value for file in source.headers for name, value in load_file(source.folder / file).items()
    }
    joined = source.joined
    assert {part.tensor for parts in joined.parts.values() for part in parts} == set(stored)
    for parameter in joined.parts:
        if joined.converted(parameter):
            whole = joined.join(parameter, stored)
            assert torch.equal(whole, tiny_experts("mixtral").get_parameter(parameter))
            for name, piece in joined.apart(parameter, whole).items():
                assert torch.equal(piece, stored[name])


def test_an_expert_that_is_missing_is_named(tiny_experts, tmp_path):
    folder = tmp_path / "model"
    model = tiny_experts("mixtral")
    model.save_pretrained(folder)
    plan, _ = plan_for(folder, model)
    stored = load_file(folder / "model.safetensors")
    left = {name: value for name, value in stored.items() if ".experts.3." not in name}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj' must hold its 1536 values. Got 1152 in 6 tensors"
    ):
        apply_plan(folder, plan, tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


def test_a_model_that_transformers_does_not_know(tiny_experts, tmp_path):
    folder = tmp_path / "model"
    model = tiny_experts("mixtral")
    model.save_pretrained(folder)
    plan, _ = plan_for(folder, model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(CheckpointError, match="must describe a model of transformers"):
        apply_plan(folder, plan, tmp_path / "out", force=True)


def deployed(folder, model, scheme_of):
    """Source, deployment and inventory of a plan for the experts and the output projections of attention."""
    everything = take_inventory(model).layers
    left = [item.name for item in everything if item.experts == 1 and not item.name.endswith("o_proj")]
    inventory, source = take_inventory(model, exclude=left), Source.open(folder)
    assignment = {layer.name: scheme_of(layer) for layer in inventory.layers}
    return source, deployment_of(source, inventory, assignment), inventory


SIZES = {"hidden_size": 64, "intermediate_size": 32}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_are_packed_one_by_one_for_vllm(kind, tiny_experts, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    tiny_experts(kind, **SIZES, moe_intermediate_size=32).save_pretrained(folder, max_shard_size="90KB")
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    schemes = {True: "w8-g32", False: "w4-float32"}
    source, deployment, inventory = deployed(
        folder, model, lambda layer: schemes[".1." in layer.name and layer.experts > 1]
    )
    written = write("vllm", source, deployment, out)
    assert written.layout.planned_bytes == vllm.stored_bytes(deployment)
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    gate = "block_sparse_moe.experts.3.w1" if kind == "mixtral" else "mlp.experts.3.gate_proj"
    assert f"model.layers.1.{gate}.weight_packed" in names
    assert f"model.layers.1.{gate}.weight" not in names
    back = dict(packed.read_back(out, deployment))
    assert set(back) == set(deployment.plan.layers)
    loaded = load_checkpoint(out).model
    loaded.set_experts_implementation("eager")
    with torch.no_grad(), fake_quantized(model, deployment.plan, inventory):
        for name, measured in model.named_parameters():
            torch.testing.assert_close(loaded.get_parameter(name), measured, rtol=1e-6, atol=1e-7)
            layer = name.removesuffix(".weight")
            torch.testing.assert_close(back.get(layer, measured), measured, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(loaded(TOKENS)[0], model(TOKENS)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_transformers_loads_packed_experts_of_one_scheme(kind, tiny_experts, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    model = tiny_experts(kind, **SIZES, moe_intermediate_size=32)
    model.save_pretrained(folder)
    source, deployment, inventory = deployed(folder, model, lambda layer: "w4-float32")
    write("vllm", source, deployment, out)
    loaded = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager").eval()
    with torch.no_grad(), fake_quantized(model, deployment.plan, inventory):
        torch.testing.assert_close(loaded(TOKENS)[0], model(TOKENS)[0], rtol=1e-5, atol=1e-5)


def test_fused_experts_in_a_file_are_not_packed_for_vllm(tiny_experts, tmp_path):
    folder = tmp_path / "model"
    model = tiny_experts("mixtral", **SIZES)
    model.save_pretrained(folder, save_original_format=False)
    source, deployment, _ = deployed(folder, model, lambda layer: "w4")
    with pytest.raises(
        CheckpointError, match=r"must be stored apart to be packed.*experts\.(gate_up|down)_proj"
    ):
        write("vllm", source, deployment, tmp_path / "out")
