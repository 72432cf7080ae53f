"""Searches whose scores are split by context: one plan over all contexts, or one for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from quant.plan import parse_plan
from sensitivity.contexts import context_of, in_context, members
from sensitivity.session import Session
from sensitivity.units import InspectUnit, ScoreRow
from service.deciding import Deciding
from service.local import Local
from service.local_inputs import factory_source, file_data
from service.runner.inputs import spec_of
from service.settings import Settings
from service.wire import JobRequest

PARAMETERS: dict[str, Any] = {
    "budgets": ["5 bpw"],
    "schemes": ["w2", "w3", "w4", "w8"],
    "task": "diffusion",
    "samples": 8,
    "batch_size": 4,
    "evaluations": 0,
    "interactions": False,
}


@pytest.fixture(scope="module")
def data(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser's steps, each in one of two classes."""
    path = tmp_path_factory.mktemp("classes") / "steps.safetensors"
    save_file({**load_file(tiny("denoiser").data), "context": torch.arange(20) % 2}, path)
    return path


@pytest.fixture(scope="module")
def search(tiny: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """search(**changes) -> (the job's record, its plans, a session like its workers)."""
    folder, model = tmp_path_factory.mktemp("search"), tiny("denoiser")
    settings = Settings(
        data_dir=folder / "data",
        database_url=f"sqlite:///{folder}/data/bitplan.db",
        executor="in_process",
        workers=1,
    )

    def run(**changes: Any) -> Any:
        with Local(settings) as local:
            source, given = factory_source(model.location, settings), file_data(data)
            wanted = local.request(local.model(source), local.calibration(given), PARAMETERS | changes)
            job = local.run(wanted)
            return job, local.plans(job.id), Session(spec_of(wanted, source, given.source))

    return run


def losses(session: Session, assignment: dict[str, str], part: str) -> dict[str, float]:
    """The mean divergence in each class."""
    facts, found = session.run(InspectUnit()).facts, []
    for pair in session.forwards.pairs(part, tuple(assignment.items())):
        found.append(session.task.divergence(pair.reference, pair.outputs))
    values = np.concatenate(found)
    return {name: float(values[members(name, facts["contexts"][part], None)].mean()) for name in ("0", "1")}


@pytest.mark.parametrize(
    ("contexts", "over"),
    [
        ({"plans": "weighted"}, lambda found: (found["0"] + found["1"]) / 2),
        ({"plans": "weighted", "weights": {"1": 3}}, lambda found: (found["0"] + 3 * found["1"]) / 4),
        ({"plans": "weighted", "weights": {"1": 0}}, lambda found: found["0"]),
        ({"plans": "maximum"}, lambda found: max(found.values())),
    ],
)
def test_one_plan_over_contexts_is_the_best_by_their_mean_or_worst(
    search: Any, contexts: Any, over: Any
) -> None:
    job, [answer], session = search(contexts=contexts)
    assert job.state == "succeeded", job.problem
    plan = parse_plan(json.dumps(answer["document"]))
    assert plan.metric == "output_kl"
    measured = {item["source"]: item["measured"]["mean"] for item in answer["candidates"]}
    assert measured[answer["source"]] == min(measured.values())
    expected = over(losses(session, plan.assignment, "choosing"))
    assert measured[answer["source"]] == pytest.approx(expected, rel=1e-6)
    assert answer["evidence"]["samples"] == 6
    if contexts["plans"] == "maximum":
        assert plan.objective == "worst: output_kl@0, output_kl@1"
        assert [part["name"] for part in answer["parts"]] == ["output_kl@0", "output_kl@1"]
        assert max(part["value"] for part in answer["parts"]) == plan.certificate.objective
        assert answer["status"] == "optimal"


def test_each_context_that_counts_is_an_objective(search: Any) -> None:
    job, [answer], _ = search(contexts={"plans": "weighted", "weights": {"1": 3}}, chooser="nsga2")
    assert job.state == "succeeded", job.problem
    assert {tuple(point["objectives"]) for point in answer["pareto"]} == {("0", "1", "bits_per_weight")}
    for point in answer["pareto"]:
        mean = (point["objectives"]["0"] + 3 * point["objectives"]["1"]) / 4
        assert point["measured"]["mean"] == pytest.approx(mean)


def test_a_search_may_be_solved_for_its_interactions(search: Any) -> None:
    job, [answer], _ = search(objective="quadratic", interactions=True)
    assert job.state == "succeeded", job.problem
    assert answer["document"]["objective"] == answer["candidates"][0]["source"] == "quadratic"
    assert answer["bound"] <= answer["objective"] == pytest.approx(sum(p["value"] for p in answer["parts"]))
    assert [part["name"] for part in answer["parts"]] == ["diagonal", "interactions"]


def test_each_context_has_its_plan_and_its_evidence(search: Any, tmp_path: Path) -> None:
    job, plans, session = search(
        contexts={"plans": "each"}, metrics=["metric_decoupled"], role_metrics={"*": "sqnr"}
    )
    assert job.state == "succeeded", job.problem
    assert [plan["metric"] for plan in plans] == ["metric_decoupled@0", "metric_decoupled@1"]
    assert [entry["context"] for entry in job.summary["plans"]] == ["0", "1"]
    for answer in plans:
        plan = parse_plan(json.dumps(answer["document"]))
        assert set((plan.decided_by or {}).values()) == {"sqnr"}
        entry = next(row for row in answer["evidence"]["entries"] if row["name"] == "plan")
        expected = losses(session, plan.assignment, "reporting")[str(context_of(plan.metric or ""))]
        assert entry["divergence"]["mean"] == pytest.approx(expected, rel=1e-6)
    assert sum(plan["evidence"]["samples"] for plan in plans) == 6


@pytest.mark.slow
def test_ranges_of_timesteps_are_contexts_too(search: Any) -> None:
    job, plans, _ = search(contexts={"plans": "each", "edges": [500]})
    assert job.state == "succeeded", job.problem
    assert [plan["metric"] for plan in plans] == ["output_kl@timestep:-500", "output_kl@timestep:500-"]


@pytest.mark.parametrize(
    ("contexts", "words"),
    [
        ({"edges": [5000]}, "Got 0 in 'timestep:5000-' of the scoring part"),
        ({"weights": {"2": 1}}, "Weights must be of contexts: 0, 1. Got '2'"),
        ({"weights": {"0": 0, "1": 0}}, "A weight must be more than 0. Got 0 for every context: 0, 1"),
    ],
)
def test_contexts_that_the_data_lack_are_refused_before_scoring(
    search: Any, contexts: Any, words: str
) -> None:
    job, _, _ = search(contexts=contexts)
    assert job.state == "failed"
    assert job.problem["type"].endswith("unknown-context")
    assert words in job.problem["detail"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contexts": {"plans": "some"}}, "weighted"),
        ({"contexts": {"edges": [500, 250]}}, "Edges must rise"),
        ({"contexts": {"edges": [0]}}, "greater than 0"),
        ({"contexts": {"plans": "each", "weights": {"0": 1}}}, "Weights must come with weighted plans"),
        ({"contexts": {"weights": {"0": -1}}}, "greater than or equal to 0"),
        ({"contexts": {}, "metrics": ["weight_error"]}, "Contexts must be planned by one of output_kl"),
        ({"contexts": {}, "metrics": ["metric_decoupled"], "role_metrics": {"*": "fisher"}}, "Got 'fisher'"),
        ({"contexts": {}, "metrics": ["auto"]}, "Got 'auto'"),
    ],
)
def test_bad_requests(changes: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        JobRequest.model_validate({"model": "m", "calibration": "c"} | PARAMETERS | changes)


# -- rows over contexts, against the definition -------------------------------------------------------


def rows() -> list[ScoreRow]:
    chance = np.random.default_rng(0)
    return [
        ScoreRow(
            layer, scheme, in_context(metric, context), float(chance.normal(5)), float(chance.random()), 4
        )
        for layer in ("a", "b")
        for scheme in ("w2", "w4")
        for metric in ("output_kl", "sqnr")
        for context in ("x", "y", "z")
    ]


@pytest.mark.parametrize("plans", ["weighted", "maximum"])
def test_scores_over_contexts_are_weighted_means_or_worsts(plans: str) -> None:
    weights = {"x": 2.0, "z": 0.0} if plans == "weighted" else {}
    deciding = Deciding(("output_kl", "sqnr"), {}, ("x", "y", "z"), plans, weights)
    found = {(row.layer, row.scheme, row.metric): row for row in deciding.rows(rows())}
    for layer, scheme, metric in {(row.layer, row.scheme, row.metric.split("@")[0]) for row in rows()}:
        parts = [found[layer, scheme, f"{metric}@{context}"] for context in "xyz"]
        row = found[layer, scheme, metric]
        if plans == "weighted":
            assert row.value == pytest.approx((2 * parts[0].value + parts[1].value) / 3)
            assert row.stderr == pytest.approx(np.hypot(2 * parts[0].stderr, parts[1].stderr) / 3)
            assert row.samples == 12
        else:
            worst = max if metric == "output_kl" else min
            assert row.value == worst(part.value for part in parts)


def test_a_context_that_is_not_scored_yet_leaves_a_gap() -> None:
    deciding = Deciding(("output_kl",), {}, ("x", "y", "z", "later"))
    assert not [row for row in deciding.rows(rows()) if row.metric == "output_kl"]


@pytest.mark.slow
def test_the_command_writes_a_plan_for_each(
    tiny: Any, data: Path, tmp_path: Path, run_factory: Callable[..., Any]
) -> None:
    def run(*options: object) -> Any:
        return run_factory(tiny("denoiser"), "-c", data, "-b", "5 bpw", "--no-interactions", *options)

    found = run("--contexts", "each", "-o", tmp_path / "plans")
    assert found.exit_code == 0, found.output
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == [
        "5-bpw-0.plan.json",
        "5-bpw-1.plan.json",
    ]
    assert "plan 5 bpw 1" in found.output
    found = run("--context-weight", "1=x")
    assert found.exit_code == 2
    assert "A weight must be a number" in found.output
    one = tmp_path / "one.json"
    found = run("--timestep-edge", "500", "--context-weight", "timestep:500-=2", "-o", one)
    assert found.exit_code == 0, found.output
    assert parse_plan(one.read_bytes()).metric == "output_kl"
