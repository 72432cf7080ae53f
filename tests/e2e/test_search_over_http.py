"""Two models go in over HTTP, plans with evidence come out; and everything that can be asked afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from quant.digest import digest, folder_digest
from quant.plan import parse_plan, plan_json, plan_schema
from search.solve import solve
from sensitivity.units import MeasureUnit
from service.cli.main import app
from service.client import Client, JobHandle
from service.db.repositories import scores, units
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs, score_table
from service.planning.question import compile_ask
from service.store.blobs import BlobStore

pytestmark = pytest.mark.slow

SCHEMES = ("w2", "w3", "w4", "w6")
RESNET = {
    "schemes": SCHEMES,
    "metrics": ("output_kl", "hessian_trace", "fisher", "sqnr"),
    "samples": 8,
    "batch_size": 4,
    "max_probes": 8,
    "relative_error": 0.9,
    "evaluations": 4,
}
LLAMA = {"schemes": SCHEMES, "samples": 8, "sequence_length": 12, "batch_size": 4, "evaluations": 4}
BUDGETS = {"resnet": ("3 bpw", "3.5 bpw", "uniform w4"), "llama": ("3 bpw", "uniform w4")}
PARAMETERS = {"resnet": RESNET, "llama": LLAMA}
KINDS = ("resnet", "llama")


@pytest.fixture(scope="module")
def client(service) -> Iterator[Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def inputs(resnet, llama):
    return {"resnet": resnet, "llama": llama}


@pytest.fixture(scope="module")
def submitted(client, inputs) -> dict[str, JobHandle]:
    return {kind: submit(client, inputs[kind], kind) for kind in KINDS}


@pytest.fixture(scope="module")
def seen() -> dict[str, list[dict[str, Any]]]:
    """What the progress callback was given, by model."""
    return {kind: [] for kind in KINDS}


@pytest.fixture(scope="module")
def finished(submitted, seen) -> dict[str, JobHandle]:
    return {kind: job.wait(seen[kind].append, timeout=120) for kind, job in submitted.items()}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return str(request.param)


@pytest.fixture
def job(finished, kind) -> JobHandle:
    return finished[kind]


def submit(client: Client, given: Any, kind: str, **changes: Any) -> JobHandle:
    parameters = {"budgets": BUDGETS[kind], **PARAMETERS[kind], **changes}
    return client.submit(given.folder, given.calibration, **parameters)


def stored(service, job: JobHandle) -> tuple[frozenset[str], frozenset[tuple[str, str, str]]]:
    with service.database() as database, database.read() as session:
        score_set = job.refresh().resource["score_set"]
        return units.keys(session, score_set), scores.keys(session, score_set)


def arrays_of(service, job: JobHandle, assignment: dict[str, str]) -> dict[str, Any]:
    """What the workers measured of a plan on the reporting part, sample by sample."""
    unit = MeasureUnit(tuple(assignment.items()), "reporting")
    with service.database() as database, database.read() as session:
        record = units.get(session, job.resource["score_set"], unit.key)
    return BlobStore(service.folder / "data").get_arrays(record.artifact)


def test_progress_is_told_until_the_end(job, kind, seen):
    told = seen[kind]
    assert told[-1]["state"] == "succeeded"
    assert {"scoring", "measuring"} <= {resource["stage"] for resource in told}
    assert all(0 <= one["progress"]["done"] <= one["progress"]["total"] for one in told)
    kinds = [event["type"] for event in job.events()]
    assert kinds[0] == "queued"
    assert kinds.count("succeeded") == 1
    assert kinds[-1] == "succeeded"


def test_every_budget_has_a_plan_within_its_limit(job, kind, inputs):
    plans = job.plans()
    assert [plan.resource["budget"] for plan in plans] == list(BUDGETS[kind])
    for plan, budget in zip(plans, BUDGETS[kind], strict=True):
        document = plan.document
        totals = document["totals"]
        assert plan.status in ("optimal", "feasible")
        assert totals["bytes"] == sum(layer["bytes"] for layer in document["layers"].values())
        assert totals["bytes"] * 8 <= limit_in_bits(plan, budget)
        assert totals["bits_per_weight"] == totals["bytes"] * 8 / totals["parameters"]
        assert {layer["scheme"] for layer in document["layers"].values()} <= set(SCHEMES)


def limit_in_bits(plan, budget: str) -> float:
    if budget.endswith(" bpw"):
        return float(budget.removesuffix(" bpw")) * plan.document["totals"]["parameters"]
    uniform = {entry["name"]: entry["bytes"] for entry in plan.evidence["entries"]}
    return uniform[budget] * 8


def test_plan_documents_are_canonical_valid_and_name_what_they_came_from(job, kind, inputs, tmp_path):
    model, _ = folder_digest(inputs[kind].folder)
    for plan in job.plans():
        saved = plan.save(tmp_path / "plan.json").read_text(encoding="utf-8")
        document = json.loads(saved)
        jsonschema.Draft202012Validator(plan_schema()).validate(document)
        assert plan_json(parse_plan(saved)) == saved
        assert digest(document) == plan.resource["digest"]
        assert document["digests"]["model"] == model
        assert document["digests"]["scores"] == job.resource["score_set"]


def test_the_calibration_digest_is_that_of_the_file(job, kind, inputs):
    import hashlib

    expected = hashlib.sha256(inputs[kind].calibration.read_bytes()).hexdigest()
    assert {plan.document["digests"]["calibration"] for plan in job.plans()} == {expected}


def test_the_evidence_is_the_measured_samples(job, kind, service):
    for plan in job.plans():
        evidence = plan.evidence
        own = arrays_of(service, job, parse_plan(json.dumps(plan.document)).assignment)
        known = evidence["entries"][: 1 + len(SCHEMES)]
        others = [entry["name"] for entry in evidence["entries"][len(known) :]]
        assert evidence["part"] == "reporting"
        assert [entry["name"] for entry in known] == ["plan", *(f"uniform {scheme}" for scheme in SCHEMES)]
        assert [name.partition(" ")[0] for name in others] in (["ends", "best"], ["best"])
        assert evidence["samples"] == len(own["divergence"])
        for entry in known:
            rival = entry["name"].removeprefix("uniform ")
            layers = plan.document["layers"]
            values = own if rival == "plan" else arrays_of(service, job, dict.fromkeys(layers, rival))
            check_entry(entry, values, own)


def check_entry(entry: dict[str, Any], values: dict[str, Any], own: dict[str, Any]) -> None:
    divergence = values["divergence"]
    assert entry["divergence"]["mean"] == pytest.approx(np.mean(divergence), rel=1e-12)
    assert set(entry["quality"]) == set(values) - {"divergence"}
    if entry["name"] == "plan":
        assert entry["difference"] is None
        return
    paired = divergence - own["divergence"]
    assert entry["difference"]["mean"] == pytest.approx(np.mean(paired), rel=1e-9, abs=1e-15)
    reach = (entry["difference"]["high"] - entry["difference"]["low"]) / 2
    stderr = np.std(paired, ddof=1) / np.sqrt(len(paired))
    assert reach == pytest.approx(STUDENT[len(paired) - 1] * stderr, rel=1e-3, abs=1e-15)


STUDENT = {5: 2.5706, 7: 2.3646, 12: 2.1788}
"""The 97.5 % quantiles for the sizes of the reporting part in use here, from a printed table."""


def test_rivals_within_limits_are_those_that_fit_and_decide_the_verdict(job, kind):
    for plan, budget in zip(job.plans(), BUDGETS[kind], strict=True):
        limit = limit_in_bits(plan, budget)
        uniform = [e for e in plan.evidence["entries"] if e["name"].startswith("uniform ")]
        assert [e["within_limits"] for e in uniform] == [e["bytes"] * 8 <= limit for e in uniform]
        fitting = [e for e in uniform if e["within_limits"]]
        verdict = plan.evidence["verdict"]
        assert fitting
        assert verdict["rivals"] == [e["name"] for e in fitting]
        assert verdict["beats_all_uniform"] == all(e["difference"]["low"] > 0 for e in fitting)


def test_the_best_measured_candidate_is_the_plan(job):
    for plan in job.plans():
        tried = plan.resource["candidates"]
        rivals = ("uniform ", "ends ", "random ", "additive output_kl")
        best = min(c["measured"]["mean"] for c in tried if c["source"].startswith(rivals))
        accepted = [candidate for candidate in tried if candidate["accepted"]]
        assert accepted[-1]["measured"]["mean"] <= best
        assert accepted[-1]["source"] == plan.document["source"]
        assert any(candidate["source"] == "additive output_kl" for candidate in tried)


def test_every_metric_of_the_job_is_stored_once_for_each_choice(finished):
    job = finished["resnet"]
    rows = job.scores()
    layers = set(job.plans()[0].document["layers"])
    metrics = (*RESNET["metrics"], "gram_output")
    expected = {(layer, scheme, metric) for layer in layers for scheme in SCHEMES for metric in metrics}
    assert sorted((row.layer, row.scheme, row.metric) for row in rows) == sorted(expected)
    assert all(np.isfinite(row.value) for row in rows)


def test_an_applied_plan_computes_what_the_fake_quantized_model_does(job, kind, inputs, tmp_path):
    import torch

    from quant.apply import fake_quantized
    from quant.inventory import take_inventory

    plan = job.plans()[0]
    file, out = plan.save(tmp_path / "plan.json"), tmp_path / "checkpoint"
    result = CliRunner().invoke(app, ["apply", str(inputs[kind].folder), str(file), "-o", str(out)])
    assert result.exit_code == 0, result.output
    original, applied = load(kind, inputs[kind].folder), load(kind, out)
    example = example_input(kind)
    assignment = parse_plan(file.read_text()).assignment
    with torch.inference_mode():
        full = original(**example).logits
        with fake_quantized(original, assignment, take_inventory(original)):
            expected = original(**example).logits
        torch.testing.assert_close(applied(**example).logits, expected, rtol=0, atol=0)
    assert not torch.equal(full, expected)


def load(kind: str, folder: Path) -> Any:
    import transformers

    classes = {"resnet": "AutoModelForImageClassification", "llama": "AutoModelForCausalLM"}
    return getattr(transformers, classes[kind]).from_pretrained(folder, local_files_only=True).eval()


def example_input(kind: str) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    if kind == "resnet":
        return {"pixel_values": torch.randn(3, 1, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 40, (3, 10), generator=generator)}


def test_the_embedded_run_gives_the_same_bytes(finished, inputs, tmp_path, monkeypatch):
    job, given = finished["llama"], inputs["llama"]
    monkeypatch.setenv("BITPLAN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("BITPLAN_WORKERS", "2")
    out = tmp_path / "plans"
    command = ["run", str(given.folder), "--calibration", str(given.calibration), "-o", str(out)]
    command += ["--schemes", ",".join(SCHEMES), "--samples", "8", "--sequence-length", "12"]
    command += ["--batch-size", "4", "--evaluations", "4", "--json"]
    for budget in BUDGETS["llama"]:
        command += ["--budget", budget]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = {file.read_bytes() for file in out.iterdir()}
    sent = {plan.save(tmp_path / "sent.json").read_bytes() for plan in job.plans()}
    assert written == sent
    assert len(written) == len(BUDGETS["llama"])


def test_an_identical_job_measures_nothing_and_plans_the_same(client, service, job, kind, inputs):
    before = stored(service, job)
    dispatched = len(service.logged("dispatch.unit"))
    again = submit(client, inputs[kind], kind).wait(timeout=60)
    assert again.id != job.id
    assert stored(service, again) == before
    assert len(service.logged("dispatch.unit")) == dispatched
    assert documents(again) == documents(job)


def documents(job: JobHandle) -> list[Any]:
    return [plan.document for plan in job.plans()]


def test_an_instant_resolve_is_the_additive_optimum(service, finished):
    job = finished["resnet"]
    (plan,) = job.solve(["3.2 bpw"])
    best = additive_optimum(service, job, "3.2 bpw")
    assert plan.status == "optimal"
    assert plan.evidence is None
    assert plan.resource["objective"] == pytest.approx(best, rel=1e-9)
    chosen = {name: layer["scheme"] for name, layer in plan.document["layers"].items()}
    values = {(row.layer, row.scheme): row.value for row in job.scores("output_kl")}
    assert sum(values[cell] for cell in chosen.items()) == pytest.approx(best, rel=1e-9)


def additive_optimum(service, job: JobHandle, budget: str) -> float:
    from service.db.repositories import jobs
    from service.runner.lab import inventory_of

    with service.database() as database, database.read() as session:
        record = jobs.get(session, job.id)
        rows = scores.list_all(session, record.score_set, ["output_kl"])
        inventory = inventory_of({"inventory": jobs.inventory(session, job.id)})
    table = score_table(inventory, SCHEMES, rows, ["output_kl"])
    compiled = compile_ask(PlanningInputs(inventory, table, SCHEMES), Ask(budget))
    return solve(compiled.problem, solver="cbc", gap=0.0).objective


def test_a_resolved_plan_gets_evidence_when_asked(service, finished):
    job = finished["resnet"]
    (plan,) = job.solve(["3.3 bpw"])
    measured = plan.measure()
    assert measured.wait(timeout=60).resource["kind"] == "measure_plan"
    evidence = plan.refresh().evidence
    assert evidence["entries"][0]["name"] == "plan"
    own = arrays_of(service, job, parse_plan(json.dumps(plan.document)).assignment)
    check_entry(evidence["entries"][0], own, own)
    assert documents(job)[0] == job.plans()[0].document


def test_an_impossible_budget_is_an_answer_that_names_the_least(client, inputs, finished):
    job = submit(client, inputs["resnet"], "resnet", budgets=["100 B", "1 bpw"]).wait(timeout=60)
    for plan in job.plans():
        least = plan.resource["least_budget"]
        assert (plan.status, plan.document, plan.evidence) == ("infeasible", None, None)
        assert least
    bytes_plan, bits_plan = job.plans()
    least = int(bytes_plan.resource["least_budget"]["bytes"])
    exact, below = job.solve([f"{least} B", f"{least - 1} B"])
    assert (exact.status, below.status) == ("optimal", "infeasible")
    assert exact.document["totals"]["bytes"] == least
    assert (
        bits_plan.resource["least_budget"]["bits_per_weight"] == exact.document["totals"]["bits_per_weight"]
    )


def test_a_cancelled_job_keeps_its_scores_and_resumes(client, service, inputs, finished):
    job = submit(client, inputs["resnet"], "resnet", seed=7, evaluations=16)
    deadline = time.monotonic() + 60
    while job.refresh().resource["score_set"] is None or len(stored(service, job)[1]) < 2:
        assert time.monotonic() < deadline
        assert not job.finished
        time.sleep(0.02)
    job.cancel()
    while not job.refresh(wait_seconds=5).finished:
        assert time.monotonic() < deadline
    kept, rows = stored(service, job)
    assert job.state == "cancelled"
    assert rows
    dispatched = len(service.logged("dispatch.unit"))
    resumed = job.resume().wait(timeout=60)
    assert resumed.resource["predecessor"] == job.id
    assert resumed.resource["score_set"] == job.resource["score_set"]
    again = {line["key"] for line in service.logged("dispatch.unit")[dispatched:]}
    assert again
    assert not again & kept
    assert stored(service, resumed)[0] > kept
    assert [plan.status for plan in resumed.plans()] == ["optimal"] * len(BUDGETS["resnet"])
