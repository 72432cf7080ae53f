"""Schemes whose quantizers go by calibration data, from the search to the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from quant.plan import parse_plan, plan_json
from sensitivity.session import Session
from service.cli.main import app
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.plan_statistics import statistics_spec
from service.runner.inputs import spec_of
from service.settings import Settings

Tiny = Callable[[str], Any]
PARAMETERS: dict[str, Any] = {
    "samples": 8,
    "sequence_length": 12,
    "seed": 5,
    "batch_size": 4,
    "evaluations": 1,
}

GPTQ = ("w2-gptq", "w3-asym-gptq", "w4-g8-gptq", "w8")
ADJUSTED = ("w2-gptq-lorc1", "w4-awq")
DIVIDED = ("w3-smoothquant-aint8", "w4-gptq-smoothquant75-aint8s")
BUDGETS = {GPTQ: "4.5 bpw", ADJUSTED: "5.5 bpw", DIVIDED: "5.5 bpw"}


@pytest.fixture(
    scope="module",
    params=[
        ("llama", GPTQ),
        ("resnet", GPTQ),
        pytest.param(("bert", GPTQ), marks=pytest.mark.slow),
        pytest.param(("llama", ADJUSTED), marks=pytest.mark.slow),
        ("llama", DIVIDED),
    ],
    ids=["llama", "resnet", "bert", "adjusted", "divided"],
)
def searched(request: Any, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """(tiny model, plan file, session that measured the plan)."""
    kind, schemes = request.param
    model, folder = tiny(kind), tmp_path_factory.mktemp("searched")
    settings = Settings(
        data_dir=folder / "data",
        database_url=f"sqlite:///{folder}/data/bitplan.db",
        executor="in_process",
        workers=1,
    )
    with Local(settings) as local:
        source, data = folder_source(model.folder), file_data(model.data)
        wanted = local.request(
            local.model(source),
            local.calibration(data),
            {**PARAMETERS, "schemes": schemes, "budgets": [BUDGETS[schemes]]},
        )
        job = local.run(wanted)
        assert job.state == "succeeded", job.problem
        [plan] = local.plans(job.id)
    file = folder / "plan.json"
    file.write_text(json.dumps(plan["document"]))
    return model, file, Session(spec_of(wanted, source, data.source))


def bitplan(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_checkpoint_holds_the_very_weights_that_were_measured(
    searched: tuple[Any, Path, Any], tmp_path: Path
) -> None:
    model, file, session = searched
    plan = parse_plan(file.read_text())
    assert plan.needs_calibration
    assert plan.calibration is not None
    assert (plan.calibration.samples, plan.calibration.seed) == (8, 5)
    assert plan_json(parse_plan(plan_json(plan))) == plan_json(plan)
    menu = {layer.scheme for layer in plan.layers.values()}
    assert menu <= set(GPTQ) or menu in (set(ADJUSTED), set(DIVIDED))
    out = tmp_path / "out"
    result = bitplan("apply", model.folder, file, "-o", out, "--calibration", model.data)
    assert result.exit_code == 0, result.output
    written = load_file(out / "model.safetensors")
    for name, layer in plan.layers.items():
        assert torch.equal(written[f"{name}.weight"], session.weights.quantized(name, layer.scheme)), name


def test_without_the_data_or_with_others_it_says_what_to_pass(
    searched: tuple[Any, Path, Any], tmp_path: Path
) -> None:
    model, file, _ = searched
    result = bitplan("apply", model.folder, file, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "Pass --calibration" in " ".join(result.output.split())
    other = tmp_path / f"other{model.data.suffix}"
    other.write_bytes(model.data.read_bytes().replace(b"ba", b"be") + b"\n")
    with pytest.raises(ValueError, match="must be the file that the plan was made with"):
        statistics_spec(parse_plan(file.read_text()), folder_source(model.folder), _valid(other, model))
    assert not (tmp_path / "out").exists()


def _valid(other: Path, model: Any) -> Path:
    """A readable file of the same kind with other content."""
    if model.data_kind == "safetensors":
        from safetensors.torch import save_file

        save_file({name: t + 0 for name, t in load_file(model.data).items()}, other, metadata={"a": "b"})
    return other


def test_evaluating_needs_the_plans_data_beside_new_ones(
    searched: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPLAN_EXECUTOR", "in_process")
    model, file, _ = searched
    arguments = (
        "evaluate",
        model.folder,
        "--plan",
        file,
        "--data",
        model.data,
        "--samples",
        "8",
        "--seed",
        "9",
    )
    rest = ("--sequence-length", "12", "--json")
    refused = bitplan(*arguments, *rest)
    assert refused.exit_code == 2
    assert "Pass --calibration" in " ".join(refused.output.split())
    found = bitplan(*arguments, *rest, "--calibration", model.data)
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["plan"]["divergence"]["mean"] > 0
