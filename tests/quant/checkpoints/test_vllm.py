"""Packed by compressed-tensors: loads with transformers, and computes what was measured."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaModel

from quant.apply import fake_quantized, quantize_dequantize
from quant.checkpoints import front, vllm
from quant.checkpoints.loading import load_checkpoint
from quant.checkpoints.source import Source
from quant.export import vllm as export
from quant.export.protocol import ExportRefused
from quant.safetensors_header import read_header
from quant.schemes import parse_scheme
from sensitivity.kv_cache import rounded_cache

LOADERS = {"llama": AutoModelForCausalLM, "bert": AutoModel}
SYMMETRIC = ["w2", "w3-g32", "w4", "w4-g32", "w5-g32", "w6", "w8", None]
ANY = [*SYMMETRIC, "w4-asym", "w4-g32-asym", "w8-asym", "w8-g32-asym"]
TOKENS = torch.arange(24)[None] * 5 % 64


def outputs(model):
    with torch.no_grad():
        return model(TOKENS)[0]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("seed", range(2))
def test_transformers_computes_what_was_measured(name, seed, saved, deployed, tmp_path):
    folder = saved(name)
    model = LOADERS[name].from_pretrained(folder).eval()
    source, deployment, inventory = deployed(folder, model, SYMMETRIC, seed)
    front.write("vllm", source, deployment, tmp_path / "out")
    loaded = LOADERS[name].from_pretrained(tmp_path / "out").eval()
    found = outputs(loaded)
    with fake_quantized(model, deployment.plan, inventory):
        torch.testing.assert_close(found, outputs(model), rtol=1e-5, atol=1e-5)
    assert (found - outputs(model)).abs().max() > 0.1


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("seed", range(2))
def test_our_loader_computes_what_was_measured_with_zero_points_too(name, seed, saved, deployed, tmp_path):
    folder = saved(name)
    model = LOADERS[name].from_pretrained(folder).eval()
    source, deployment, inventory = deployed(folder, model, ANY, seed)
    front.write("vllm", source, deployment, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.plan == deployment.plan
    assert type(loaded.model) is type(model)
    with fake_quantized(model, deployment.plan, inventory):
        torch.testing.assert_close(outputs(loaded.model), outputs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_shards_and_half_precision(dtype, saved, deployed, tmp_path):
    folder = saved("llama", dtype, max_shard_size="30KB")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    scales = str(dtype).removeprefix("torch.")
    source, deployment, inventory = deployed(folder, model, [f"w4-{scales}", f"w8-g32-{scales}"])
    assert len(source.headers) > 2
    written = front.write("vllm", source, deployment, tmp_path / "out").layout
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.payload_bytes
    for tensor, file in index["weight_map"].items():
        assert tensor in read_header(tmp_path / "out" / file).tensors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    with fake_quantized(model, deployment.plan, inventory):
        assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_rounds_the_caches_that_were_measured(dtype, saved, deployed, tmp_path):
    folder = saved("llama", dtype, max_shard_size="30KB")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    scheme = f"w8-{str(dtype).removeprefix('torch.')}"
    source, deployment, inventory = deployed(folder, model, [scheme])
    caches = {f"model.layers.{layer}.self_attn": "fp8_e4m3" for layer in (0, 1)}
    deployment = replace(deployment, plan=replace(deployment.plan, kv_cache=caches))
    layout = front.write("vllm", source, deployment, tmp_path / "out").layout
    assert layout.planned_bytes == export.stored_bytes(deployment)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    with fake_quantized(model, deployment.plan, inventory):
        full = outputs(model)
        with rounded_cache(model, {"*": "kv-fp8_e4m3"}):
            expected = outputs(model)
    torch.testing.assert_close(outputs(loaded), expected, rtol=1e-5, atol=1e-5)
    assert (expected - full).abs().max() > 0.01
    ours = load_checkpoint(tmp_path / "out")
    torch.testing.assert_close(outputs(ours.model), full, rtol=1e-5, atol=1e-5)
    assert ours.plan.kv_cache == caches
    assert json.loads((tmp_path / "out" / "bitplan_provenance.json").read_text())["kv_cache"] == caches


def test_scales_of_caches_are_named_as_the_weights_are(saved, deployed, tmp_path):
    """A base model from the checkpoint of a task model: stored names have a prefix that its paths lack."""
    folder = saved("llama")
    model = LlamaModel.from_pretrained(folder).eval()
    source, deployment, _ = deployed(folder, model, ["w8"])
    caches = {f"layers.{layer}.self_attn": "fp8_e4m3" for layer in (0, 1)}
    deployment = replace(deployment, plan=replace(deployment.plan, kv_cache=caches))
    front.write("vllm", source, deployment, tmp_path / "out")
    names = set(read_header(tmp_path / "out" / "model.safetensors").tensors)
    scales = {f"model.{name}.{part}" for name in caches for part in ("k_scale", "v_scale")}
    assert {name for name in names if name.endswith(("k_scale", "v_scale"))} == scales
    back = [name for name, _, _ in vllm.unpacked(Source.open(tmp_path / "out"), deployment.plan)]
    assert sorted(back) == sorted(source.entries)


@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_those_that_the_export_counts(seed, saved, deployed):
    folder = saved("llama")
    source, deployment, _ = deployed(folder, AutoModelForCausalLM.from_pretrained(folder), ANY, seed)
    if deployment.quantized:
        assert front.layout("vllm", source, deployment).planned_bytes == export.stored_bytes(deployment)


def test_scales_that_would_be_rounded_are_refused(saved, deployed, tmp_path):
    folder = saved("llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    source, deployment, _ = deployed(folder, model, ["w4"])
    with pytest.raises(ExportRefused, match=r"q_proj: scales are loaded in the model's type.* Got w4\."):
        front.write("vllm", source, deployment, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["fp8-e5m2", "w4-tensor", "w3-asym", "w8-aint8s"])
def test_what_vllm_cannot_load_packed_is_refused(scheme, saved, deployed):
    folder = saved("llama")
    source, deployment, _ = deployed(folder, AutoModelForCausalLM.from_pretrained(folder), [scheme])
    with pytest.raises(ExportRefused, match=r"layers\.0\.self_attn\.q_proj"):
        front.layout("vllm", source, deployment)


def test_layers_planned_in_the_models_own_type_stay_as_they_are(saved, deployed, tmp_path):
    folder = saved("llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    source, deployment, inventory = deployed(folder, model, ["w4-bfloat16", "bf16"], seed=2)
    assert 0 < len(deployment.quantized) < len(deployment.layers)
    front.write("vllm", source, deployment, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    with fake_quantized(model, deployment.plan, inventory):
        assert torch.equal(outputs(loaded), outputs(model))
    for layer, weight in vllm.read_back(tmp_path / "out", deployment):
        own, planned = model.get_submodule(layer).weight, deployment.plan.layers[layer]
        expected = quantize_dequantize(own, planned.op, layer, parse_scheme(planned.scheme))
        assert torch.equal(weight.to(own), expected)


@pytest.mark.parametrize(
    "scheme", ["fp8", "fp8-afp8", "w8-aint8", "w4-g32-aint8", "mxfp4", "mxfp8-amxfp8", "nvfp4"]
)
def test_other_formats_are_decompressed_as_they_were_measured(scheme, saved, deployed, tmp_path):
    """The library unpacks block formats to bfloat16, and divides by the reciprocal of NVFP4's tensor scale."""
    dtype = torch.bfloat16 if "fp4" in scheme or "mx" in scheme else torch.float32
    folder = saved("llama", dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    source, deployment, inventory = deployed(folder, model, [scheme])
    layout = front.write("vllm", source, deployment, tmp_path / "out").layout
    assert layout.planned_bytes == export.stored_bytes(deployment)
    tolerance = {"rtol": 2**-7, "atol": 0} if scheme == "nvfp4" else {"rtol": 0, "atol": 0}
    for layer, weight in vllm.read_back(tmp_path / "out", deployment):
        own, planned = model.get_submodule(layer).weight, deployment.plan.layers[layer]
        expected = quantize_dequantize(own, planned.op, layer, parse_scheme(planned.scheme))
        torch.testing.assert_close(weight.to(dtype), expected, **tolerance, msg=layer)
    found = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval())
    with fake_quantized(model, deployment.plan, inventory):
        expected = outputs(model)
    if scheme in ("fp8", "mxfp4"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - expected).norm() < 0.4 * expected.norm()
