"""What every checkpoint writer must do, checked for every entry of CHECKPOINTS."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quant.apply import quantize_dequantize
from quant.catalog import CHECKPOINTS
from quant.checkpoints import front
from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import Source
from quant.digest import folder_digest
from quant.formats import FORMATS
from quant.inventory import take_inventory
from quant.plan import parse_plan
from quant.safetensors_header import read_header
from quant.schemes import parse_scheme
from tests.deployments import alike, deployment_of

CANDIDATES = ("w4", "w4-g16", "w4-g32-asym", "q8_0")


@pytest.fixture(scope="module")
def folder(byte_level, tmp_path_factory):
    place = tmp_path_factory.mktemp("source")
    config = LlamaConfig(
        vocab_size=byte_level(place),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def inventory(folder):
    return take_inventory(LlamaForCausalLM.from_pretrained(folder))


@pytest.fixture
def accepted(folder, inventory):
    """accepted(consumer): source and deployment of a plan that the consumer takes."""

    def find(consumer, model=None):
        source = Source.open(folder)
        for scheme in CANDIDATES:
            assignment = {layer.name: scheme for layer in inventory.layers}
            digests = {"model": model or source.digest, "scores": "b" * 64}
            deployment = deployment_of(source, inventory, assignment, **digests)
            if not front.lint(consumer, deployment):
                return source, deployment
        raise AssertionError(f"{consumer} takes none of {CANDIDATES}")

    return find


MENU = [
    f"{fmt.name}-rtn"
    for family in FORMATS.values()
    for fmt in family.examples
    if fmt.refuses((32, 32)) is None and getattr(fmt, "group_size", None) in (None, 4, 32)
]
MENU += ["w4-lorc2", "q8_0-lorc2", "nvfp4-lorc3", "w8-aint8", "fp8-afp8s", "nvfp4-anvfp4s", "w4-aint8s"]


@pytest.fixture(scope="module")
def deployed(folder, inventory):
    """deployed({layer: scheme}): source and deployment."""
    source = Source.open(folder)
    return lambda assignment: (source, deployment_of(source, inventory, assignment))


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "onnxruntime"])
def test_random_plans_are_written_as_measured_or_refused_by_layer_and_rule(
    name, deployed, inventory, folder, tmp_path
):
    """ONNX Runtime's graph takes seconds to trace: tests/quant/checkpoints/test_onnxruntime.py."""
    chance, taken, refused = random.Random(name), [], []
    for scheme in MENU:
        _, deployment = deployed({layer.name: scheme for layer in inventory.layers})
        (refused if front.lint(name, deployment) else taken).append(parse_scheme(scheme).name)
    chosen = alike([layer.name for layer in inventory.layers], lambda: chance.choice(taken))
    source, deployment = deployed(chosen)
    model = LlamaForCausalLM.from_pretrained(folder)
    front.write(name, source, deployment, tmp_path / "out", inputs={}.__getitem__)
    for layer, weight in CHECKPOINTS[name].load().read_back(tmp_path / "out", deployment):
        own, scheme = model.get_submodule(layer).weight, parse_scheme(chosen[layer])
        assert torch.equal(weight, quantize_dequantize(own, "linear", layer, scheme)), (layer, scheme.name)
    alone = [layer for layer in chosen if layer.endswith(("o_proj", "down_proj"))]
    broken = {layer: chance.choice(refused) for layer in alone} if refused else {}
    violations = front.lint(name, deployed(chosen | broken)[1])
    assert {item.layer for item in violations} == set(broken)
    assert all(item.rule and broken[item.layer] in item.got for item in violations)


def sizes(place):
    files = place.iterdir() if place.is_dir() else [place]
    return {file.name: file.stat().st_size for file in files}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_entry_is_complete(name):
    entry = CHECKPOINTS[name]
    assert entry.name == name
    assert entry.writes in ("folder", "file")
    assert entry.summary
    assert entry.source
    assert all(callable(getattr(entry.load(), verb)) for verb in ("lint", "layout", "write", "read_back"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_files_are_those_that_the_dry_run_told(name, accepted, tmp_path):
    source, deployment = accepted(name)
    told, heard = front.layout(name, source, deployment), []
    out = tmp_path / "out"
    written = front.write(name, source, deployment, out, wrote=heard.append)
    assert written.layout == told
    if CHECKPOINTS[name].writes == "folder":
        assert sizes(out) == {file.name: file.bytes for file in told.files}
    else:
        assert out.stat().st_size == told.bytes
    assert sorted(set(heard)) == sorted(deployment.plan.layers)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_read_back_are_those_that_were_measured(name, accepted, folder, tmp_path):
    source, deployment = accepted(name)
    front.write(name, source, deployment, tmp_path / "out")
    model, heard = LlamaForCausalLM.from_pretrained(folder), set()
    for layer, weight in CHECKPOINTS[name].load().read_back(tmp_path / "out", deployment):
        own, planned = model.get_submodule(layer).weight, deployment.plan.layers[layer]
        scheme = parse_scheme(planned.scheme)
        assert torch.equal(weight, quantize_dequantize(own, planned.op, layer, scheme)), layer
        heard.add(layer)
    assert heard == set(deployment.plan.layers)


@pytest.mark.parametrize("name", [name for name, entry in CHECKPOINTS.items() if entry.writes == "folder"])
def test_payload_and_provenance_of_folders(name, accepted, tmp_path):
    source, deployment = accepted(name)
    layout = front.write(name, source, deployment, tmp_path / "out").layout
    for file in layout.files:
        place = tmp_path / "out" / file.name
        if place.name == "model.onnx.data":
            continue  # the graph says what lies in it: tests/quant/checkpoints/test_onnxruntime.py
        stored = read_header(place).tensors.values() if place.suffix == ".safetensors" else ()
        assert file.payload_bytes == sum(entry.nbytes for entry in stored), file.name
    assert 0 < layout.planned_bytes <= layout.payload_bytes
    assert parse_plan((tmp_path / "out" / "bitplan_plan.json").read_text()) == deployment.plan
    told = json.loads((tmp_path / "out" / "bitplan_provenance.json").read_text())
    assert (told["consumer"], told["plan"]) == (name, deployment.plan.digest)
    assert (told["model"], told["planned_for"], told["scores"]) == (source.digest, source.digest, "b" * 64)
    assert (told["forced"], told["mismatches"]) == (False, [])
    assert "kv_cache" not in told


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_equal_inputs_give_equal_bytes(name, accepted, tmp_path):
    source, deployment = accepted(name)
    for out in ("one", "two"):
        front.write(name, source, deployment, tmp_path / out)
    if CHECKPOINTS[name].writes == "file":
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    else:
        contents = [
            {file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in ("one", "two")
        ]
        assert contents[0] == contents[1]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_of_another_model_need_force_and_are_told(name, accepted, tmp_path):
    source, deployment = accepted(name, model="a" * 64)
    with pytest.raises(CheckpointError, match="Plan must be made for this model"):
        front.write(name, source, deployment, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    told = front.write(name, source, deployment, tmp_path / "out", force=True).provenance
    assert (told.model, told.planned_for, told.forced) == (source.digest, "a" * 64, True)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_nothing_appears_when_writing_fails(name, accepted, tmp_path, monkeypatch):
    source, deployment = accepted(name)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        front.write(name, source, deployment, tmp_path / "out", wrote=stop)
    assert os.listdir(tmp_path) == []
    used = shutil.disk_usage(tmp_path)._replace(free=front.layout(name, source, deployment).bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used)
    with pytest.raises(OSError, match="Disk must have .* bytes free"):
        front.write(name, source, deployment, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_output_in_use_is_refused(name, accepted, tmp_path):
    source, deployment = accepted(name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for out in (tmp_path / "out", tmp_path / "out" / "mine.txt"):
        with pytest.raises(CheckpointError, match="must be new"):
            front.write(name, source, deployment, out)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_an_unknown_consumer_is_refused(accepted):
    source, deployment = accepted("pytorch")
    with pytest.raises(CheckpointError, match=r"Consumer must be one of pytorch.* Got 'tensorrt'"):
        front.layout("tensorrt", source, deployment)


def test_a_missing_library_is_named(accepted, tmp_path, monkeypatch):
    source, deployment = accepted("pytorch")
    monkeypatch.setitem(sys.modules, "quant.checkpoints.tensors", None)
    with pytest.raises(CheckpointError, match=r"Got no module 'quant\.checkpoints\.tensors'\. Install"):
        front.write("pytorch", source, deployment, tmp_path / "out")


def test_linting_needs_neither_torch_nor_a_library():
    libraries = sorted(
        {"torch", "numpy", *(entry.library for entry in CHECKPOINTS.values() if entry.library)}
    )
    code = (
        "import sys; from quant.catalog import CHECKPOINTS; import quant.checkpoints.front;"
        " [entry.load() for entry in CHECKPOINTS.values()];"
        f" sys.exit(bool(set({libraries!r}) & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_folders_are_digested_as_models_are(folder):
    assert Source.open(folder).digest == folder_digest(folder)[0]
