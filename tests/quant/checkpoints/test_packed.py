"""Packed folders: they hold the plan's bytes and load as the very tensors that the dequantized ones hold."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from quant.adjusted import dequantized
from quant.apply import NonFinite
from quant.checkpoints import front, packed
from quant.checkpoints.loading import load_checkpoint
from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import Source
from quant.export.protocol import ExportRefused
from quant.formats import FORMATS, codec_of
from quant.inputs import LayerInputs
from quant.inventory import take_inventory
from quant.safetensors_header import read_header
from quant.schemes import parse_scheme
from tests.deployments import plan_of

KINDS = {"llama": LlamaForCausalLM, "bert": BertModel}
COLUMNS = 64
MENU = [
    f"{fmt.name}-rtn"
    for family in FORMATS.values()
    for fmt in family.examples
    if fmt.refuses((COLUMNS, COLUMNS)) is None and fmt.refuses((COLUMNS, 96)) is None
]
MENU += [
    "w3-gptq",
    "w4-g32-asym-hqq",
    "w3-lorc4",
    "w4-gptq-lorc2",
    "w3-g16-asym-awq",
    "nvfp4-awq",
    "q4_0-rtn-lorc3",
]
MENU += [
    "w8-aint8",
    "w4-smoothquant-aint8s",
    "w8-smoothquant30-aint4",
    "nvfp4-anvfp4s",
    "fp8-afp8",
    "mxfp8-amxfp8",
]


def inputs_of(inventory):
    """Made-up statistics for every layer, by name."""

    def known(name):
        columns, seed = inventory.by_name[name].matrix[1], list(inventory.by_name).index(name)
        samples = torch.randn(200, columns, generator=torch.Generator().manual_seed(seed))
        return LayerInputs((samples.T @ samples / 200)[None], 200, samples.abs().amax(dim=0))

    return known


def assert_packed_as_applied(source, deployment, out, **found):
    """Write both ways; the packed folder is as large as told, and loads as the dequantized one."""
    told = front.layout("pytorch-packed", source, deployment)
    assert front.write("pytorch-packed", source, deployment, out / "packed", **found).layout == told
    assert {file.name: file.bytes for file in told.files} == {
        path.name: path.stat().st_size for path in (out / "packed").iterdir()
    }
    headers = [read_header(path) for path in (out / "packed").glob("*.safetensors")]
    assert told.payload_bytes == sum(entry.nbytes for header in headers for entry in header.tensors.values())
    front.apply_plan(source.folder, deployment.plan, out / "applied", **found)
    small, applied = (load_checkpoint(out / name) for name in ("packed", "applied"))
    assert small.plan == applied.plan == deployment.plan
    states = small.model.state_dict(), applied.model.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[1].items():
        assert states[0][name].dtype == value.dtype
        assert torch.equal(states[0][name], value), name
    return told


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["llama", "bert"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_random_plans_load_as_the_dequantized_folder_does(
    seed, kind, dtype, saved, deployed, tmp_path_factory
):
    folder = saved(kind, dtype, max_shard_size="90KB")
    model = KINDS[kind].from_pretrained(folder, dtype=dtype)
    source, deployment, inventory = deployed(folder, model, [*MENU, None], seed)
    if not deployment.plan.layers:
        return
    out = tmp_path_factory.mktemp("out")
    told = assert_packed_as_applied(source, deployment, out, inputs=inputs_of(inventory))
    static = sum(deployment.schemes[name].needs_range for name in deployment.plan.layers)
    assert told.planned_bytes == deployment.plan.totals.bytes - 4 * static


def test_every_scheme_packs_into_the_bytes_that_the_plan_counts():
    generator = torch.Generator().manual_seed(0)
    matrix, samples = (
        torch.randn(32, COLUMNS, generator=generator),
        torch.randn(99, COLUMNS, generator=generator),
    )
    known = LayerInputs((samples.T @ samples / 99)[None], 99, samples.abs().amax(dim=0))
    for scheme in map(parse_scheme, MENU):
        made = scheme.load()(matrix, codec_of(scheme.weight).own_format(scheme.weight), known)
        slots, tensors = packed._slots(scheme, (32, COLUMNS)), packed._tensors(made)
        assert {part: (slot.nbytes, slot.shape) for part, slot in slots.items()} == {
            part: (tensor.nbytes, tuple(tensor.shape)) for part, tensor in tensors.items()
        }, scheme.name
        counted = scheme.storage((32, COLUMNS)).bytes - 4 * scheme.needs_range
        assert sum(slot.nbytes for slot in slots.values()) == counted
        restored = dequantized(packed._stored(tensors, scheme, (32, COLUMNS)))
        assert torch.equal(restored, dequantized(made)), scheme.name


def planned(folder, model, schemes, include=(), corrections=None):
    inventory, source = take_inventory(model, include=include), Source.open(folder)
    assignment = {layer.name: schemes[at % len(schemes)] for at, layer in enumerate(inventory.layers)}
    plan = plan_of(inventory, assignment, model=source.digest)
    return source, front.plan_deployment(replace(plan, corrections=corrections), source)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_packed_whole_however_they_are_stored(kind, tiny_experts, tmp_path):
    folder = tmp_path / "model"
    tiny_experts(kind).save_pretrained(folder, max_shard_size="9KB")
    model = AutoModelForCausalLM.from_pretrained(folder)
    source, deployment = planned(folder, model, ("w3", "w4-g4-asym", "w8-tensor", "w2-lorc2"))
    told = assert_packed_as_applied(source, deployment, tmp_path)
    assert told.planned_bytes == deployment.plan.totals.bytes


def test_convolutions_and_their_corrections(tiny, tmp_path):
    folder = tiny("resnet").folder
    model = AutoModelForImageClassification.from_pretrained(folder)
    source, deployment = planned(folder, model, ("w4", "w3-g8-asym", "fp8"), corrections={"bias": 1})
    name, bias = next((name, value) for name, value in model.named_parameters() if name.endswith("bias"))
    assert_packed_as_applied(source, deployment, tmp_path, corrected={name: bias.detach() + 1})


def test_models_of_diffusers_and_the_index_of_their_shards(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    torch.manual_seed(0)
    sides = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = diffusers.UNet2DModel(in_channels=1, out_channels=1, **sides, **blocks).to(torch.float16)
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    source, deployment = planned(tmp_path / "model", model, ("w4", "w3-g8-asym"))
    assert len(source.headers) > 1
    assert_packed_as_applied(source, deployment, tmp_path)
    loaded = load_checkpoint(tmp_path / "packed").model
    assert type(loaded) is diffusers.UNet2DModel
    assert not loaded.training
    index = json.loads((tmp_path / "packed" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    packed_source = Source.open(tmp_path / "packed")
    assert index["weight_map"] == {name: file for name, (file, _) in packed_source.entries.items()}


def test_folders_that_nothing_would_load_are_refused(saved, tmp_path):
    source, deployment = planned(saved("llama"), LlamaForCausalLM.from_pretrained(saved("llama")), ("w4",))
    unnamed = replace(deployment, model=replace(deployment.model, config={"hidden_size": 64}))
    with pytest.raises(ExportRefused, match=r"config\.json: it must name model_type .* Got neither"):
        front.write("pytorch-packed", source, unnamed, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "unheard_of"},
            r"must describe a model of transformers\. Got .*unheard_of.* Save the",
        ),
        (
            {"_class_name": "DDPMScheduler"},
            r"_class_name must name a model of diffusers\. Got 'DDPMScheduler'",
        ),
    ],
)
def test_configurations_of_no_known_model_are_refused(change, message, written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "spoiled")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_tied_weights_are_packed_once(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16))
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["transformer.wte.weight"].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    source, deployment = planned(folder, model, ("w4", "w3-asym"), include=["lm_head"])
    told = assert_packed_as_applied(source, deployment, tmp_path)
    assert told.planned_bytes == deployment.plan.totals.bytes
    loaded = load_checkpoint(tmp_path / "packed").model
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_values_that_the_own_type_does_not_hold_are_refused(saved, deployed, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved("llama", torch.float16), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, :2] = torch.tensor([65504.0, -65504.0])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(folder)
    source, deployment, _ = deployed(folder, model, ["w2-asym-rtn-float32"])
    with pytest.raises(NonFinite, match="up_proj"):
        front.write("pytorch-packed", source, deployment, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def written(saved, tmp_path_factory):
    folder = saved("llama")
    source, deployment = planned(folder, LlamaForCausalLM.from_pretrained(folder), ("w4-asym", "nvfp4"))
    out = tmp_path_factory.mktemp("packed") / "out"
    front.write("pytorch-packed", source, deployment, out)
    return out


def test_transformers_alone_does_not_take_codes_for_weights(written):
    with pytest.raises(RuntimeError, match="mismatch"):
        LlamaForCausalLM.from_pretrained(written)


FIRST = "model.layers.0.self_attn.q_proj"


def spoil_config(change):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def spoil_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config(lambda told: {**told, "tensors": 3}), r"must describe the packed tensor of every layer.*Got 3"),
        (spoil_config(lambda told: {**told, "tensors": {"a": {"layer": "b"}}}), "must describe the packed tensor"),
        (
            spoil_config(lambda told: {**told, "tensors": {k: {**v, "dtype": "I8"} for k, v in told["tensors"].items()}}),
            "must describe the packed tensor",
        ),
        (
            spoil_tensors(lambda tensors: tensors.pop(f"{FIRST}.weight_scales")),
            rf"'{FIRST}\.weight_scales' must be F16 of shape \(64, 1\)\. Got none\. Write the checkpoint again",
        ),
        (
            spoil_tensors(lambda tensors: tensors.update({f"{FIRST}.weight": torch.zeros(3, dtype=torch.uint8)})),
            rf"'{FIRST}\.weight' must be U8 of shape \(2048,\)\. Got U8 of shape \(3,\)",
        ),
    ],
)  # fmt: skip
def test_spoiled_folders_are_refused(spoil, message, written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "spoiled")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)
