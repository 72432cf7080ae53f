"""The worker's side of a checkpoint job."""

import json
import shutil
import tarfile

import pytest
from transformers import LlamaForCausalLM

from quant.checkpoints import front
from quant.checkpoints.source import Source
from quant.inventory import take_inventory
from quant.plan import Certificate, Digests, parse_plan, plan_json
from quant.planning import build_plan
from sensitivity.errors import BadUnit
from sensitivity.spec import NO_DATA, ModelSource, SessionSpec
from sensitivity.units import InspectUnit, WriteUnit
from service.checkpoint_writer import (
    CheckpointRefused,
    CheckpointWriter,
    DiskFull,
    archive,
    room_for,
)
from service.checkpoints import read_progress


@pytest.fixture
def model(tiny):
    return tiny("llama").folder


@pytest.fixture
def writer(model):
    return CheckpointWriter(SessionSpec(ModelSource("folder", str(model), "d"), NO_DATA))


@pytest.fixture
def folder(model, tmp_path):
    """folder(scheme): a job's folder with a plan in it."""

    def make(scheme="w4", digest=None):
        inventory = take_inventory(LlamaForCausalLM.from_pretrained(model))
        plan = build_plan(
            inventory,
            {layer.name: scheme for layer in inventory.layers},
            digests=Digests(model=digest or Source.open(model).digest),
            certificate=Certificate("feasible"),
            source="test",
        )
        place = tmp_path / "job"
        place.mkdir(exist_ok=True)
        (place / "plan.json").write_text(plan_json(plan))
        return place

    return make


@pytest.mark.parametrize("consumer", ["pytorch", "pytorch-packed", "vllm"])
def test_the_archive_holds_the_files_of_the_checkpoint(consumer, writer, folder, tmp_path):
    place = folder()
    (place / "out").mkdir()
    (place / "out" / "left by a worker that died").write_text("")
    facts = writer.run(WriteUnit(consumer, str(place))).facts
    with tarfile.open(place / "result") as packed:
        members = packed.getmembers()
        packed.extractall(tmp_path / "unpacked", filter="data")
    assert {member.name: member.size for member in members} == {
        file["name"]: file["bytes"] for file in facts["layout"]["files"]
    }
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    assert facts["bytes"] == (place / "result").stat().st_size
    told = json.loads((tmp_path / "unpacked" / "bitplan_provenance.json").read_text())
    assert told == {**facts["provenance"], "mismatches": list(facts["provenance"]["mismatches"])}
    assert sorted(path.name for path in place.iterdir()) == ["plan.json", "progress", "result"]
    assert read_progress(place) == (14, 14)


def test_equal_folders_give_equal_archives(tmp_path):
    for name, order in (("one", "ab"), ("two", "ba")):
        place = tmp_path / name
        place.mkdir()
        for letter in order:
            (place / letter).write_text(letter)
        archive(place, tmp_path / f"{name}.tar")
        assert not place.exists()
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(writer, folder, model, monkeypatch):
    place = folder()
    deployed = front.plan_deployment(parse_plan((place / "plan.json").read_bytes()), Source.open(model))
    needed = room_for(front.layout("pytorch", Source.open(model), deployed))
    used = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=needed - 1))
    with pytest.raises(DiskFull, match=rf"must have {needed:,} bytes free"):
        writer.run(WriteUnit("pytorch", str(place)))
    assert [path.name for path in place.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("scheme", "digest", "words"),
    [
        ("w4-tensor", None, "Plan must be one that vllm can run"),
        ("w4", "a" * 64, "Plan must be made for this model"),
        ("w4-gptq", None, "calibration data must be given"),
    ],
)
def test_refusals_are_told_as_such(scheme, digest, words, writer, folder):
    with pytest.raises(CheckpointRefused, match=words):
        writer.run(WriteUnit("vllm", str(folder(scheme, digest))))


def test_other_units_are_refused(writer):
    with pytest.raises(BadUnit, match="must be asked to write"):
        writer.run(InspectUnit())


def test_no_progress_yet(tmp_path):
    assert read_progress(tmp_path) is None
