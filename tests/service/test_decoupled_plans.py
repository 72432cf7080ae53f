"""Searches with metric_decoupled, from the scores of each role to the plan that says what decided it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from quant.plan import parse_plan, plan_schema
from sensitivity.session import Session
from service.db.engine import Database
from service.db.repositories import jobs
from service.local import Local
from service.local_inputs import factory_source, file_data
from service.runner.inputs import spec_of
from service.settings import Settings
from service.wire import JobRequest

Tiny = Callable[[str], Any]
PARAMETERS: dict[str, Any] = {
    "budgets": ["4.5 bpw"],
    "schemes": ["w2", "w3", "w4", "w8"],
    "metrics": ["metric_decoupled"],
    "role_metrics": {"*conv_in": "ssim"},
    "ratios": [0.5, 1, 2],
    "task": "diffusion",
    "samples": 8,
    "batch_size": 4,
    "evaluations": 0,
}
DECIDED = {"conv_in": "ssim", "conv_out": "sqnr", "time_embedding": "sqnr"}


@pytest.fixture(scope="module")
def lab(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """search(**changes) -> (the job's record, its plans, all scores by metric, a session like its workers')."""
    folder, model = tmp_path_factory.mktemp("search"), tiny("denoiser")
    settings = Settings(
        data_dir=folder / "data",
        database_url=f"sqlite:///{folder}/data/bitplan.db",
        executor="in_process",
        workers=1,
    )

    def search(**changes: Any) -> Any:
        with Local(settings) as local:
            source, data = factory_source(model.location, settings), file_data(model.data)
            wanted = local.request(local.model(source), local.calibration(data), PARAMETERS | changes)
            job = local.run(wanted)
            return job, local.plans(job.id), Session(spec_of(wanted, source, data.source))

    search.url = settings.database_url
    return search


def test_the_plan_says_what_decided_each_layer_and_is_the_best_measured(lab: Any) -> None:
    job, [answer], session = lab()
    assert job.state == "succeeded", job.problem
    plan = parse_plan(json.dumps(answer["document"]))
    assert plan.decided_by == DECIDED
    assert plan.metric == "metric_decoupled"
    assert set(answer["document"]) <= set(plan_schema()["properties"])
    tried = {item["source"]: item["measured"]["mean"] for item in answer["candidates"]}
    assert {source for source in tried if re.match(r"decoupled (ssim|sqnr) x (0.5|1|2)$", source)}
    assert tried[answer["source"]] == min(tried.values())
    assert answer["resources"]["bits_per_weight"] <= 4.5
    assert tried[answer["source"]] == pytest.approx(loss_of(session, plan.assignment), rel=1e-6)


def loss_of(session: Session, assignment: dict[str, str]) -> float:
    """Square root of the mean relative noise error times the mean loss of similarity, on the choosing part."""
    errors, similar = [], []
    for pair in session.forwards.pairs("choosing", tuple(assignment.items())):
        errors.append(session.task.divergence(pair.reference, pair.outputs))
        similar.append(session.task.quality(pair.outputs, pair.batch, pair.reference)["ssim"])
    return float(np.sqrt(np.concatenate(errors).mean() * (1 - np.concatenate(similar)).mean()))


def test_only_the_metric_of_its_role_is_measured_for_a_layer(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[tuple[str, tuple[str, ...]]] = set()
    run = Session.run

    def watching(session: Session, unit: Any) -> Any:
        if hasattr(unit, "metrics"):
            asked.add((unit.layer, unit.metrics))
        return run(session, unit)

    monkeypatch.setattr(Session, "run", watching)
    job, _, _ = lab(seed=1, interactions=False)
    assert job.state == "succeeded", job.problem
    assert asked == {(layer, (metric,)) for layer, metric in DECIDED.items()}


def test_roles_and_protected_layers_are_the_users(lab: Any) -> None:
    job, [answer], _ = lab(
        roles={"conv_*": "feed_forward"},
        role_metrics={},
        protect=["time_*"],
        pins={"conv_in": "w3"},
        budgets=["8 bpw"],
    )
    assert job.state == "succeeded", job.problem
    plan = parse_plan(json.dumps(answer["document"]))
    assert plan.decided_by == {"conv_in": "ssim", "conv_out": "ssim", "time_embedding": "sqnr"}
    assert plan.assignment["time_embedding"] == "w8"
    assert plan.assignment["conv_in"] == "w3"
    with closing(Database(lab.url)) as database, database.read() as session:
        found = jobs.inventory(session, job.id)
    assert {layer["role"] for layer in found["layers"]} == {"feed_forward", "embedding"}


def test_a_role_may_have_a_budget_of_its_own(lab: Any) -> None:
    limits = {"convolution": "bytes<=40", "time_*": "12 bpw", "*conv_out": "bytes>=20"}
    job, [answer], _ = lab(role_limits=limits, budgets=["8 bpw"])
    assert job.state == "succeeded", job.problem
    plan = parse_plan(json.dumps(answer["document"]))
    assert sum(plan.layers[name].bytes for name in ("conv_in", "conv_out")) <= 40
    assert plan.layers["conv_out"].bytes >= 20
    assert plan.layers["time_embedding"].bytes <= 12
    assert plan.budget == "8 bpw,convolution: bytes<=40,time_*: 12 bpw,*conv_out: bytes>=20"


@pytest.mark.parametrize(
    ("changes", "slug", "words"),
    [
        ({"role_limits": {"router": "4 bpw"}}, "invalid-request", "A role must be one of the model's layers"),
        ({"role_limits": {"nothing": "4 bpw"}}, "invalid-request", "Got 'nothing'"),
        ({"role_metrics": {"*.attn3": "ssim"}}, "unknown-layer", "attn3"),
        ({"role_metrics": {"*": "loss_delta"}}, "metric-not-offered", "Got 'loss_delta' for"),
        ({"roles": {"nothing": "head"}}, "unknown-layer", "nothing"),
        ({"protect": ["nothing"]}, "invalid-request", "nothing"),
        (
            {"ties": [["conv_in", "conv_out"]]},
            "invalid-request",
            "decided by one metric. Got conv_in by ssim",
        ),
    ],
)
def test_what_the_model_lacks_is_refused_before_scoring(
    lab: Any, changes: Any, slug: str, words: str
) -> None:
    job, _, _ = lab(seed=7, **changes)
    assert job.state == "failed"
    assert job.problem["type"].endswith(slug)
    assert words in job.problem["detail"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ["output_kl"]}, "role_metrics must come with the metric metric_decoupled"),
        ({"role_metrics": {"head": "metric_decoupled"}}, "must have a metric of its own"),
        ({"role_metrics": {"head": "beauty"}}, "A metric must be one of"),
        ({"roles": {"*": "hero"}}, "A role must be one of cross_attention"),
        ({"role_limits": {"head": "a lot"}}, "Got 'a lot'"),
        ({"kv_cache": ["int8"]}, "must decide weights alone"),
        ({"ratios": []}, "at least 1 item"),
        ({"ratios": [0]}, "greater than 0"),
        ({"ratios": [1, 1]}, "must be distinct"),
        ({"role_metrics": {"head": "weight_error"}, "schemes": ["w8-aint8"]}, "Got 'weight_error'"),
    ],
)
def test_bad_requests(changes: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        JobRequest.model_validate({"model": "m", "calibration": "c"} | PARAMETERS | changes)


def test_the_command_takes_the_same(tiny: Tiny, tmp_path: Path, run_factory: Callable[..., Any]) -> None:
    model, out = tiny("denoiser"), tmp_path / "plan.json"
    line = ["-b", "5 bpw", "-o", out, "--metric", "metric_decoupled", "--role-metric", "conv_in=ssim"]
    line += ["--ratio", "1", "--ratio", "2"]
    own = ["--protect", "time_embedding", "--role", "conv_out=head", "--role-limit", "head=9 bpw"]
    found = run_factory(model, *line, *own)
    assert found.exit_code == 0, found.output
    plan = parse_plan(out.read_bytes())
    assert plan.decided_by == DECIDED
    assert plan.assignment["time_embedding"] == "w8"
    refused = run_factory(model, *line, "--role-metric", "conv_out")
    assert refused.exit_code == 2
    assert "must be written ROLE=METRIC" in refused.output
