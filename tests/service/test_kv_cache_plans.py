"""Jobs that decide weights and caches together, from the scores to the evidence and the weights on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from quant.plan import Plan, parse_plan, plan_from_json
from sensitivity.session import Session
from sensitivity.units import MeasureUnit
from service.app import create_app
from service.cli.main import app
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.catalog import load_handlers
from service.runner.inputs import spec_of
from service.runner.loop import Runner
from service.settings import Settings
from service.wire import JobRequest

Tiny = Callable[[str], Any]
ATTENTION = ("model.layers.0.self_attn", "model.layers.1.self_attn")
PARAMETERS: dict[str, Any] = {
    "budgets": ["memory_bytes<=13000"],
    "schemes": ["w4", "w8"],
    "kv_cache": ["fp8", "int8", "int4"],
    "deployment": {"context_length": 64},
    "samples": 8,
    "sequence_length": 12,
    "seed": 5,
    "batch_size": 4,
    "evaluations": 4,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("caches")
    database = f"sqlite:///{folder}/data/bitplan.db"
    return Settings(data_dir=folder / "data", database_url=database, executor="in_process", workers=1)


def searched(model: Any, settings: Settings, **changes: Any) -> tuple[Any, list[Any], JobRequest]:
    with Local(settings) as local:
        source, data = local.model(folder_source(model.folder)), local.calibration(file_data(model.data))
        wanted = local.request(source, data, PARAMETERS | changes)
        job = local.run(wanted)
        return job, local.plans(job.id), wanted


@pytest.fixture(scope="module")
def found(tiny: Tiny, settings: Settings) -> tuple[Plan, Any, Session]:
    model = tiny("llama")
    job, [answer], wanted = searched(model, settings)
    assert job.state == "succeeded", job.problem
    source, data = folder_source(model.folder), file_data(model.data).source
    return parse_plan(json.dumps(answer["document"])), answer, Session(spec_of(wanted, source, data))


def test_the_plan_holds_caches_beside_weights(found: tuple[Plan, Any, Session]) -> None:
    plan, answer, session = found
    assert plan.kv_cache is not None
    assert tuple(plan.kv_cache) == ATTENTION
    assert set(plan.weights) == {layer.name for layer in session.inventory.layers}
    used = answer["resources"]
    assert used["memory_bytes"] <= 13000
    sizes = {"full": 16 * 16, "fp8_e4m3": 8 * 16, "int8": 8 * 16 + 2 * 16, "int4": 4 * 16 + 2 * 16}
    assert used["kv_cache_bytes"] == sum(64 * sizes[kind] // 8 for kind in plan.kv_cache.values())
    assert used["memory_bytes"] == plan.totals.checkpoint_bytes + used["kv_cache_bytes"]


def test_the_evidence_is_of_weights_and_caches_together(found: tuple[Plan, Any, Session]) -> None:
    plan, answer, session = found
    entries = {entry["name"]: entry for entry in answer["evidence"]["entries"]}
    changed = tuple(item for item in plan.assignment.items() if item[1] != "kv-full")
    measured = session.run(MeasureUnit(changed, "reporting")).facts["divergence"]
    assert entries["plan"]["divergence"]["mean"] == pytest.approx(measured["mean"], rel=1e-12)
    kinds = ("", " kv-fp8_e4m3", " kv-int8", " kv-int4")
    uniform = [name for name in entries if name.startswith("uniform")]
    assert set(uniform) == {f"uniform {w}{kind}" for w, kind in product(("w4", "w8"), kinds)}
    rivals = [entries[name] for name in uniform if entries[name]["within_limits"]]
    assert entries["plan"]["divergence"]["mean"] <= min(rival["divergence"]["mean"] for rival in rivals)
    joint = dict.fromkeys(plan.weights, "w4") | dict.fromkeys(ATTENTION, "kv-int4")
    both = session.run(MeasureUnit(tuple(joint.items()), "reporting")).facts["divergence"]["mean"]
    assert entries["uniform w4 kv-int4"]["divergence"]["mean"] == pytest.approx(both, rel=1e-12)


def test_another_search_measures_no_score_again_and_keeps_pins(
    found: tuple[Plan, Any, Session], tiny: Tiny, settings: Settings
) -> None:
    changes: dict[str, Any] = {"kv_cache": ["int8"], "pins": {ATTENTION[0]: "kv-int4"}, "evaluations": 0}
    job, [answer], _ = searched(tiny("llama"), settings, **changes, ties=[["*mlp*"]])
    assert job.state == "succeeded", job.problem
    document = answer["document"]
    assert document["kv_cache"][ATTENTION[0]] == "int4"
    assert document["kv_cache"][ATTENTION[1]] in ("full", "int8")
    names = {entry["name"] for entry in answer["evidence"]["entries"]}
    assert {name for name in names if name.startswith("uniform")} == {
        "uniform w4",
        "uniform w4 kv-int8",
        "uniform w8",
        "uniform w8 kv-int8",
    }
    with Local(settings) as local:
        from service.db.repositories import units

        with local.database.read() as session:
            scored = units.list_kind(session, str(job.score_set), "score")
            own = [unit for unit in scored if unit.job_id == job.id]
    assert any(unit.unit["scheme"] == "kv-int4" for unit in scored)
    assert own == []


def test_a_resolve_is_measured_beside_its_rivals(
    found: tuple[Plan, Any, Session], tiny: Tiny, settings: Settings
) -> None:
    """Over HTTP, on the data directory of the search: caches pinned in a re-solve are measured with it."""
    with TestClient(create_app(settings)) as http, Local(settings) as local:
        job = next(job for job in http.get("/v1/jobs").json()["items"] if job["state"] == "succeeded")
        body = {"budgets": ["memory_bytes<=12500"], "pins": {"*.self_attn": "kv-int8"}, "limits": []}
        [plan] = http.post(f"/v1/jobs/{job['id']}/plans", json=body).json()["items"]
        assert set(plan["document"]["kv_cache"].values()) == {"int8"}
        measuring = http.post(f"/v1/plans/{plan['id']}/measure").json()
        Runner(settings, local.database, load_handlers()).run_job(measuring["id"])
        evidence = http.get(f"/v1/plans/{plan['id']}").json()["evidence"]
    entries = {entry["name"]: entry for entry in evidence["entries"]}
    assigned = plan_from_json(plan["document"]).assignment
    measured = found[2].run(MeasureUnit(tuple(assigned.items()), "reporting")).facts["divergence"]
    assert entries["plan"]["divergence"]["mean"] == pytest.approx(measured["mean"], rel=1e-12)
    pinned = dict.fromkeys(found[0].weights, "w8") | dict.fromkeys(ATTENTION, "kv-int8")
    expected = found[2].run(MeasureUnit(tuple(pinned.items()), "reporting")).facts["divergence"]
    assert {name for name in entries if name.startswith("uniform")} == {"uniform w4", "uniform w8"}
    assert entries["uniform w8"]["divergence"]["mean"] == pytest.approx(expected["mean"], rel=1e-12)


def test_a_checkpoint_leaves_weights_to_their_schemes_and_says_which_caches_it_is_for(
    found: tuple[Plan, Any, Session], tiny: Tiny, tmp_path: Path
) -> None:
    plan, _, session = found
    file, out = tmp_path / "plan.json", tmp_path / "out"
    file.write_text(json.dumps(plan.as_json()))
    arguments = ["apply", tiny("llama").folder, file, "-o", out, "--json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert json.loads((out / "bitplan_provenance.json").read_text())["kv_cache"] == plan.kv_cache
    assert parse_plan((out / "bitplan_plan.json").read_bytes()) == plan
    written = load_file(out / "model.safetensors")
    for name, layer in plan.layers.items():
        assert written[f"{name}.weight"].equal(session.weights.quantized(name, layer.scheme)), name


def test_a_model_without_a_cache_fails_at_once(tiny: Tiny, settings: Settings) -> None:
    job, _, _ = searched(tiny("bert"), settings, budgets=["4 bpw"])
    assert job.state == "failed"
    assert "menu of cache types must be for a model that generates" in job.problem["detail"]
    assert job.stage == "loading"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"kv_cache": ["int3"]}, "type of a key-value cache must be one of fp8, fp8_e4m3, .* Got 'int3'"),
        ({"kv_cache": ["fp8", "fp8_e4m3"]}, "Entries must be distinct"),
        ({"kv_cache": ["float16"]}, "Got 'float16'"),
        ({"kv_cache": ["int8"], "metrics": ["fisher"]}, "Got 'fisher', which looks at layers alone"),
        ({"pins": {"*.self_attn": "kv-int8"}}, "scheme of a cache must come with a menu"),
        ({"kv_cache": ["int8"], "deployment": {"kv_cache": "int4"}}, "menu leaves full must be one of"),
        ({"kv_cache": ["int8"], "budgets": ["kv_cache_bytes<=uniform kv-int4"]}, "uniform limit must name"),
    ],
)
def test_bad_menus_are_refused_at_once(members: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        JobRequest.model_validate({"model": "m", "calibration": "c", "budgets": ["4 bpw"]} | members)


def test_the_command_takes_a_menu_and_shows_the_caches(tiny: Tiny, settings: Settings) -> None:
    model = tiny("llama")
    arguments = [
        "run",
        model.folder,
        "-c",
        model.data,
        "-b",
        "kv_cache_bytes<=2200",
        "--kv-cache",
        "fp8,int8",
    ]
    arguments += ["--schemes", "w8", "--samples", "8", "--sequence-length", "12", "--context-length", "64"]
    arguments += ["--data-dir", settings.data_dir, "--evaluations", "0", "--no-interactions"]
    environment = {"BITPLAN_EXECUTOR": "in_process"}
    texts = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, texts, env=environment)
    assert result.exit_code == 0, result.output
    assert "w8 x 14, kv-fp8_e4m3 x 2" in result.output or "kv-int8 x" in result.output
    shown = CliRunner().invoke(app, [*texts, "--dry-run", "--json"], env=environment)
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.output)
    assert (told["layers"], told["caches"], told["choices"]) == (14, list(ATTENTION), 14 + 2 * 3)
    refused = CliRunner().invoke(app, [*texts, "--runtime", "torchao"], env=environment)
    assert refused.exit_code == 2
    assert "torchao keeps no type of cache that can be decided" in " ".join(refused.output.split())
