"""Corrections from the search to the checkpoint: what was measured is what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from quant.catalog import CORRECTIONS
from quant.checkpoints.front import apply_plan
from quant.checkpoints.loading import load_checkpoint
from quant.checkpoints.protocol import CheckpointError
from quant.plan import PlanError, parse_plan, plan_json
from sensitivity.session import Session
from sensitivity.units import MeasureUnit, unit_from_json
from service.cli.main import app
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.inputs import spec_of
from service.settings import Settings

Tiny = Callable[[str], Any]
BOTH = ("batch_norm", "bias")


@pytest.fixture(scope="module", params=["resnet", "bert"])
def searched(request: Any, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """(tiny model, plan file, session that measured the plan)."""
    model, folder = tiny(request.param), tmp_path_factory.mktemp("searched")
    database = f"sqlite:///{folder}/data/bitplan.db"
    settings = Settings(data_dir=folder / "data", database_url=database, executor="in_process", workers=1)
    wanted = {
        "samples": 8,
        "sequence_length": 12,
        "batch_size": 4,
        "evaluations": 1,
        "schemes": ["w2", "w3", "w8"],
        "budgets": ["4.5 bpw"],
        "corrections": ["bias", "batch_norm"],
    }
    with Local(settings) as local:
        source, data = folder_source(model.folder), file_data(model.data)
        asked = local.request(local.model(source), local.calibration(data), wanted)
        job = local.run(asked)
        assert job.state == "succeeded", job.problem
        [plan] = local.plans(job.id)
    file = folder / "plan.json"
    file.write_text(json.dumps(plan["document"]))
    return plan, file, (model, Session(spec_of(asked, source, data.source)))


def bitplan(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_checkpoint_holds_exactly_the_tensors_that_were_measured(searched: Any, tmp_path: Path) -> None:
    resource, file, (model, session) = searched
    plan = parse_plan(file.read_text())
    assert plan.corrections == {name: CORRECTIONS[name].version for name in BOTH}
    assert plan.calibration is not None
    assert plan_json(parse_plan(plan_json(plan))) == plan_json(plan)
    unit = MeasureUnit(tuple(plan.assignment.items()), "reporting", BOTH)
    measured = session.run(unit).facts["divergence"]["mean"]
    assert measured == resource["evidence"]["entries"][0]["divergence"]["mean"]

    out = tmp_path / "out"
    result = bitplan("apply", model.folder, file, "-o", out, "--calibration", model.data)
    assert result.exit_code == 0, result.output
    before, after = (load_file(folder / "model.safetensors") for folder in (model.folder, out))
    expected = session.corrections.tensors(plan.assignment.items(), BOTH)
    expected |= {f"{n}.weight": session.weights.quantized(n, x.scheme) for n, x in plan.layers.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= set(expected)
    assert changed - {f"{name}.weight" for name in plan.layers}, "biases or statistics changed"
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    batch = session.forwards.batches("reporting").__iter__().__next__()
    assignment = tuple(plan.assignment.items())
    inside = session.forwards.outputs(batch, assignment, session.corrections.tensors(assignment, BOTH))
    loaded = load_checkpoint(out).model.eval()
    with torch.inference_mode():
        assert torch.equal(session.task.outputs(loaded, batch).rows, inside.rows)


def test_the_model_is_as_before_a_measurement(searched: Any) -> None:
    _, file, (_, session) = searched
    plan = parse_plan(file.read_text())
    before = {
        name: (tensor.data_ptr(), tensor.clone()) for name, tensor in session.model.state_dict().items()
    }
    full = session.run(MeasureUnit((), "choosing", BOTH))
    session.run(MeasureUnit(tuple(plan.assignment.items()), "choosing", BOTH))
    for name, tensor in session.model.state_dict().items():
        pointer, values = before[name]
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, values)
    assert full.facts["divergence"]["mean"] == pytest.approx(0, abs=1e-9)


def test_without_the_data_it_says_what_to_pass(searched: Any, tmp_path: Path) -> None:
    _, file, (model, _) = searched
    for arguments in (("apply", model.folder, file, "-o", tmp_path / "out"),):
        result = bitplan(*arguments)
        assert result.exit_code == 2
        assert "has the corrections batch_norm, bias" in " ".join(result.output.split())
        assert "Pass --calibration" in " ".join(result.output.split())
    plan = parse_plan(file.read_text())
    with pytest.raises(CheckpointError, match="corrections batch_norm, bias"):
        apply_plan(model.folder, plan, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"must hold the tensor 'no\.such\.bias'"):
        apply_plan(model.folder, plan, tmp_path / "out", corrected={"no.such.bias": torch.zeros(1)})
    assert not (tmp_path / "out").exists()


def test_other_versions_and_unknown_corrections_are_refused(searched: Any, tmp_path: Path) -> None:
    _, file, (model, _) = searched
    document = json.loads(file.read_text())
    document["corrections"]["bias"] = 99
    newer = parse_plan(json.dumps(document))
    with pytest.raises(CheckpointError, match="must use correction bias version 1. Got version 99"):
        apply_plan(model.folder, newer, tmp_path / "out", corrected={})
    document["corrections"] = {"weights": 1}
    with pytest.raises(PlanError, match="versions of some of batch_norm, bias"):
        parse_plan(json.dumps(document))


def test_units_name_their_corrections() -> None:
    plain, corrected = (MeasureUnit((("a", "w2"),), "choosing", names) for names in ((), ("bias",)))
    assert plain.key != corrected.key
    assert corrected.key.endswith(":bias1")
    assert unit_from_json(corrected.as_json()) == corrected
    assert MeasureUnit((), "choosing", ("bias",)) == MeasureUnit((), "choosing")
