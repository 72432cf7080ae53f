"""Jobs whose schemes round activations, from the search to the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from quant.plan import Plan, parse_plan
from sensitivity.session import Session
from service.cli.main import app
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.inputs import spec_of
from service.settings import Settings
from service.wire import JobRequest

Tiny = Callable[[str], Any]
MENU = ["w4-aint8", "w4-aint4", "w8-aint8s", "w8-aint4s", "w8"]
PARAMETERS: dict[str, Any] = {
    "budgets": ["bops<=1.8e6"],
    "schemes": MENU,
    "samples": 8,
    "sequence_length": 12,
    "seed": 5,
    "batch_size": 4,
    "evaluations": 2,
}


def searched(
    model: Any, folder: Path, executor: str, workers: int, **changes: Any
) -> tuple[Plan, Any, Session]:
    settings = Settings(
        data_dir=folder / "data",
        database_url=f"sqlite:///{folder}/data/bitplan.db",
        executor=executor,  # type: ignore[arg-type]
        workers=workers,
    )
    with Local(settings) as local:
        source, data = folder_source(model.folder), file_data(model.data)
        wanted = local.request(local.model(source), local.calibration(data), PARAMETERS | changes)
        job = local.run(wanted)
        assert job.state == "succeeded", job.problem
        [answer] = local.plans(job.id)
    return parse_plan(json.dumps(answer["document"])), answer, Session(spec_of(wanted, source, data.source))


@pytest.fixture(scope="module")
def found(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Any, Session]:
    return searched(tiny("llama"), tmp_path_factory.mktemp("search"), "in_process", 1)


def test_a_limit_on_bops_chooses_activations_and_the_plan_says_so(found: tuple[Plan, Any, Session]) -> None:
    plan, answer, session = found
    assert answer["resources"]["bops"] <= 1.8e6
    assert plan.totals.bops == answer["resources"]["bops"]
    assert set(plan.activations.values()) <= {"int8", "int4", "int8s", "int4s"}
    assert len(set(plan.assignment.values())) > 1
    static = [name for name in plan.activations if plan.activations[name].endswith("s")]
    assert list(plan.needs_calibration) == static
    assert (plan.calibration is None) == (not static)
    assert session.inventory.parameters == plan.totals.parameters


def test_a_checkpoint_holds_the_weights_and_says_what_it_does_not_hold(
    found: tuple[Plan, Any, Session], tiny: Tiny, tmp_path: Path
) -> None:
    plan, _, session = found
    model, file, out = tiny("llama"), tmp_path / "plan.json", tmp_path / "out"
    file.write_text(json.dumps(plan.as_json()))
    arguments = ("apply", model.folder, file, "-o", out, "--calibration", model.data, "--json")
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["activations"] == plan.activations
    assert json.loads((out / "bitplan_provenance.json").read_text())["activations"] == plan.activations
    written = load_file(out / "model.safetensors")
    for name, layer in plan.layers.items():
        assert torch.equal(written[f"{name}.weight"], session.weights.quantized(name, layer.scheme)), name


@pytest.mark.slow
def test_two_workers_find_the_plan_that_one_does(
    tiny: Tiny, tmp_path: Path, found: tuple[Plan, Any, Session]
) -> None:
    """Processes of their own, so that nothing of static ranges is shared but the data."""
    plan, answer, _ = searched(tiny("llama"), tmp_path / "pool", "local_pool", 2)
    assert plan.digest == found[0].digest
    assert answer["evidence"] == found[1]["evidence"]


@pytest.mark.parametrize("place", ["schemes", "pins"])
def test_a_metric_that_does_not_see_activations_is_refused_at_once(place: str) -> None:
    request: dict[str, Any] = {
        "model": "m",
        "calibration": "c",
        "budgets": ["4 bpw"],
        "metrics": ["output_kl", "fisher"],
    }
    request |= {"schemes": ["w4", "w8-aint8"]} if place == "schemes" else {"pins": {"head": "w8-aint8"}}
    with pytest.raises(ValidationError, match="Got 'fisher', which looks at weights alone, for 'w8-aint8'"):
        JobRequest.model_validate(request)
    JobRequest.model_validate(request | {"metrics": ["output_kl", "sqnr"]})
