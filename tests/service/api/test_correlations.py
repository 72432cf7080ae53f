"""Correlations are asked of a search, answered by a job, and refused where they cannot be measured."""

from __future__ import annotations

import pytest

from service.states import JobState

ANSWER = {
    "job": "job_1",
    "part": "choosing",
    "samples": 8,
    "divergence": "kl",
    "notes": ["a layer fell back"],
    "scores": [
        {
            "name": "output_kl",
            "metrics": ["output_kl"],
            "weight": 0.0,
            "forwards": 64,
            "stability": 0.9,
            "resolved": None,
        }
    ],
    "budgets": [],
}


def ask(api, job, **members):
    return api.http.post(f"/v1/jobs/{job['id']}/correlations", json=members)


def test_asking_twice_is_one_job_and_the_newest_answer_is_given(api, runner, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/correlations"
    assert finished_job["links"]["correlations"] == path
    none = api.http.get(path)
    assert (none.status_code, none.json()["type"]) == (404, "urn:bitplan:problem:correlations-not-found")
    first, again, other = ask(api, finished_job), ask(api, finished_job), ask(api, finished_job, plans=9)
    assert (first.status_code, first.json()["kind"]) == (202, "correlate")
    assert first.headers["Location"] == f"/v1/jobs/{first.json()['id']}"
    assert again.json()["id"] == first.json()["id"] != other.json()["id"]
    early = api.http.get(path)
    assert (early.status_code, early.headers["Retry-After"]) == (409, "1")
    for job, samples in ((first, 8), (other, 9)):
        runner.finish(runner.start(job.json()["id"]), summary={**ANSWER, "samples": samples})
    assert api.http.get(path).json() == {**ANSWER, "samples": 9}
    assert ask(api, finished_job).json()["id"] == first.json()["id"]


def test_asking_again_while_the_first_job_is_cancelled_is_a_new_job(api, runner, finished_job):
    (plan,) = (
        plan
        for plan in api.http.get(f"/v1/jobs/{finished_job['id']}/plans").json()["items"]
        if plan["status"] == "optimal"
    )
    for path in (f"/v1/jobs/{finished_job['id']}/correlations", f"/v1/plans/{plan['id']}/measure"):
        dying = api.http.post(path, json={}).json()
        runner.start(dying["id"])
        assert api.http.post(path, json={}).json()["id"] == dying["id"]
        assert api.http.post(f"/v1/jobs/{dying['id']}/cancel").json()["state"] == "cancelling"
        again = api.http.post(path, json={}).json()
        assert (again["id"] != dying["id"], again["state"]) == (True, "queued")


def test_the_request_is_that_of_the_search_with_what_the_body_says(api, finished_job):
    asked = ask(api, finished_job, budgets=["5 bpw"], metrics=["fisher"]).json()["request"]
    search = finished_job["request"]
    assert asked["search"] == {**search, "budgets": ["5 bpw"], "metrics": ["fisher"], "user_metric": None}
    assert (asked["job"], asked["plans"], asked["every_stored"]) == (finished_job["id"], 60, False)
    assert ask(api, finished_job).json()["request"]["every_stored"] is True


def test_a_refined_search_is_asked_of_any_metric_its_refining_one_too(api, runner):
    search = api.submit(metrics=["fisher"], refine_metric="output_kl", interactions=True)
    runner.score(runner.start(search["id"]))
    asked = ask(api, search, metrics=["output_kl", "weight_error"])
    assert asked.status_code == 202, asked.text
    found = asked.json()["request"]["search"]
    assert (found["metrics"], found["refine_metric"]) == (["output_kl", "weight_error"], None)
    assert not found["interactions"]
    whole = ask(api, search).json()["request"]["search"]
    assert (whole["metrics"], whole["refine_metric"]) == (["fisher"], "output_kl")


def test_what_can_never_be_correlated_is_refused_at_once(api, runner):
    roles = {"metrics": ["metric_decoupled"], "role_metrics": {"*": "sqnr"}}
    for members, named in ((roles, 202), ({"contexts": {"plans": "weighted"}}, 422)):
        search = api.submit(**members)
        runner.score(runner.start(search["id"]))
        refused = ask(api, search)
        assert (refused.status_code, refused.json()["pointer"]) == (422, "")
        assert "metrics that score every layer on all samples" in refused.json()["detail"]
        other = ask(api, search, metrics=["output_kl"])
        assert other.status_code == named, other.text
    assert other.json()["type"] == "urn:bitplan:problem:metric-not-offered"


def test_a_failure_is_told(api, runner, finished_job):
    job = ask(api, finished_job).json()
    runner.finish(runner.start(job["id"]), JobState.FAILED, problem={"detail": "Out of luck."})
    problem = api.http.get(f"/v1/jobs/{finished_job['id']}/correlations").json()
    assert problem["type"] == "urn:bitplan:problem:correlations-failed"
    assert "Out of luck." in problem["detail"]
    assert ask(api, finished_job).json()["id"] != job["id"]


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({"plans": 7}, "/plans"),
        ({"plans": 10**9}, "/plans"),
        ({"budgets": []}, "/budgets"),
        ({"budgets": ["much"]}, "/budgets/0"),
        ({"budgets": ["latency<=1 ms"]}, "/latency"),
        ({"budgets": ["uniform w3"]}, ""),
        ({"metrics": ["nonsense"]}, "/metrics/0"),
        ({"metrics": ["fisher", "fisher"]}, "/metrics"),
        ({"sample": 3}, "/sample"),
    ],
)
def test_bad_requests_are_refused_with_the_member(api, finished_job, members, pointer):
    response = ask(api, finished_job, **members)
    assert response.status_code == 422, response.text
    assert response.json()["pointer"] == pointer


def test_only_a_search_that_has_looked_at_its_model_can_be_asked(api, finished_job):
    waiting = api.submit(seed=5)
    assert ask(api, waiting).json()["type"] == "urn:bitplan:problem:scores-missing"
    job = ask(api, finished_job).json()
    assert ask(api, job).json()["type"] == "urn:bitplan:problem:not-a-search"
    assert ask(api, {"id": "job_none"}).status_code == 404
    assert api.http.get("/v1/jobs/job_none/correlations").status_code == 404
