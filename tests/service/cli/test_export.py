"""`bitplan export` on a real folder: the files, the refusal, the model it was planned for."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from quant.catalog import CHECKPOINTS, EXPORTERS
from quant.digest import folder_digest
from quant.inventory import take_inventory
from quant.plan import Certificate, Digests, plan_json
from quant.planning import build_plan
from sensitivity.model_loading import load_model
from sensitivity.spec import ModelSource
from service.cli.main import app
from service.db.repositories import models
from service.local import Local, local_settings
from service.model_facts import model_facts
from service.states import InputState


@pytest.fixture(params=["llama", "bert"])
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def plan(model):
    loaded = load_model(ModelSource("folder", model.location, ""), "auto", torch.device("cpu"))
    inventory = take_inventory(loaded.model)
    digests = Digests(model=folder_digest(model.folder)[0])
    return build_plan(
        inventory,
        {layer.name: "w4" if "self" in layer.name else "w8" for layer in inventory.layers},
        digests=digests,
        certificate=Certificate("feasible"),
        source="test",
    )


@pytest.fixture
def plan_file(plan, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(plan_json(plan), encoding="utf-8")
    return file


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_files_read_back_as_the_plan(model, plan, plan_file, tmp_path):
    out = tmp_path / "out"
    result = invoke(plan_file, "--to", "vllm", "--model", model.folder, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"] == ["bitplan_provenance.json", "config.json"]
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    facts = model_facts(model.folder, plan)
    found = EXPORTERS["vllm"].load().read_back(files, facts)
    assert {name for name, value in found.items() if value is not None} == set(plan.layers)
    assert {name: value.bits for name, value in found.items() if value} == {
        name: layer.weight_bits for name, layer in plan.layers.items()
    }
    assert json.loads(files["config.json"])["model_type"] == model.name


def test_switches_that_ask_for_the_caches_are_told(model, plan, tmp_path, monkeypatch):
    """No layer here has the columns that MLX needs, so another consumer takes its switches."""
    entry = replace(EXPORTERS["llm-compressor"], cache_switches={"int8": "--kv-bits 8"})
    monkeypatch.setitem(EXPORTERS, entry.name, entry)
    (tmp_path / "plan.json").write_text(plan_json(replace(plan, kv_cache={"m.0.attn": "int8"})))
    arguments = (tmp_path / "plan.json", "--to", entry.name, "--model", model.folder, "-o")
    assert "run it with --kv-bits 8: no file asks" in invoke(*arguments, tmp_path / "one").output
    assert json.loads(invoke(*arguments, tmp_path / "two", "--json").stdout)["switches"] == "--kv-bits 8"


def test_the_model_of_this_machine_is_found_by_digest(model, plan, plan_file, tmp_path):
    source = {"kind": "local", "folder": str(model.folder)}
    with Local(local_settings(tmp_path / "data")) as local, local.database.write() as session:
        models.create(session, source=source, digest=plan.digests.model, state=InputState.READY)
    result = invoke(plan_file, "--to", "vllm", "-o", tmp_path / "out", "--data-dir", tmp_path / "data")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_unknown_model_asks_for_it(plan_file, tmp_path):
    result = invoke(plan_file, "--to", "vllm", "-o", tmp_path / "out", "--data-dir", tmp_path / "data")
    assert result.exit_code == 2
    assert "Pass --model MODEL_DIR" in result.output


def test_a_refusal_names_the_layer_and_writes_nothing(model, plan, plan_file, tmp_path):
    result = invoke(plan_file, "--to", "mlx", "--model", model.folder, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{min(plan.layers)}: symmetric weights must have" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("consumer", [name for name in CHECKPOINTS if name not in EXPORTERS])
def test_consumers_of_weights_are_sent_to_their_own_command(consumer, tmp_path):
    result = invoke(tmp_path / "plan.json", "--to", consumer, "-o", tmp_path / "out")
    assert result.exit_code == 2
    told = " ".join(result.output.split())
    assert f"It takes weights. Run bitplan checkpoint MODEL_DIR PLAN --to {consumer} -o OUT" in told


def test_a_folder_in_use_is_left_alone(model, plan_file, tmp_path):
    result = invoke(plan_file, "--to", "vllm", "--model", model.folder, "-o", tmp_path)
    assert result.exit_code == 2
    assert "Output folder must be new or empty" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


@pytest.fixture
def fine_tune(model, tmp_path):
    """A copy of the model with other values in one of its tensors."""
    folder = tmp_path / "fine-tune"
    shutil.copytree(model.folder, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    return folder


def test_a_fine_tune_needs_force_and_the_provenance_says_so(model, plan, plan_file, fine_tune, tmp_path):
    ask = (plan_file, "--to", "vllm", "--model", fine_tune, "-o", tmp_path / "out")
    refused = invoke(*ask)
    assert refused.exit_code == 2
    assert "Plan must be made for this model" in refused.output
    assert not (tmp_path / "out").exists()
    assert invoke(*ask, "--force").exit_code == 0
    told = json.loads((tmp_path / "out" / "bitplan_provenance.json").read_text())
    assert (told["forced"], told["planned_for"]) == (True, plan.digests.model)
    assert told["model"] == folder_digest(fine_tune)[0]
    own = invoke(plan_file, "--to", "vllm", "--model", model.folder, "-o", tmp_path / "own", "--force")
    assert own.exit_code == 0
    told = json.loads((tmp_path / "own" / "bitplan_provenance.json").read_text())
    assert (told["forced"], told["mismatches"], told["model"]) == (False, [], plan.digests.model)
