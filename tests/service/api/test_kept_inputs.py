from __future__ import annotations

import pytest

from service.api import job_inputs
from service.api.kept_inputs import KeptInputs
from service.db.repositories import scores
from service.records import ScoreRecord


@pytest.fixture
def made(monkeypatch):
    """How often planning inputs were read from the database."""
    calls = []
    original = job_inputs._inputs
    monkeypatch.setattr(job_inputs, "_inputs", lambda *given: calls.append(given) or original(*given))
    return calls


def _ask(api, job, budget, **body):
    response = api.http.post(f"/v1/jobs/{job['id']}/plans", json={"budgets": [budget], **body})
    assert response.status_code == 201, response.text
    return response.json()["items"][0]


def test_the_next_budget_reads_no_scores(api, finished_job, made):
    first, second = (_ask(api, finished_job, budget) for budget in ("3 bpw", "5 bpw"))
    assert len(made) == 1
    assert first["objective"] > second["objective"]
    _ask(api, finished_job, "3 bpw", pins={"a.q": "w8"})
    _ask(api, finished_job, "3 bpw", metric="weight_error")
    assert len(made) == 3


def test_new_scores_are_seen(api, finished_job, made):
    _ask(api, finished_job, "3 bpw")
    path, body = f"/v1/jobs/{finished_job['id']}/plans", {"budgets": ["3 bpw"], "pins": {"a.q": "w3"}}
    assert api.http.post(path, json=body).status_code == 409
    job = api.http.get(f"/v1/jobs/{finished_job['id']}").json()
    with api.context.database.write() as session:
        row = ScoreRecord(job["score_set"], "a.q", "w3", "output_kl", 0.125, None, 8, "score:a.q:w3")
        scores.insert(session, [row])
    plan = api.http.post(path, json=body).json()["items"][0]
    assert plan["document"]["layers"]["a.q"]["scheme"] == "w3"


def test_jobs_that_run_are_read_anew(api, runner, made):
    job = api.submit()
    runner.score(runner.start(job["id"]))
    for budget in ("3 bpw", "5 bpw"):
        _ask(api, job, budget)
    assert len(made) == 2


def test_only_the_last_few_are_kept():
    kept, made = KeptInputs(most=2), []
    for key in ("a", "b", "a", "c", "a", "b"):
        kept.get(key, lambda key=key: made.append(key) or object())
    assert made == ["a", "b", "c", "b"]
