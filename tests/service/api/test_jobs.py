from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from service.api.job_resources import Score
from service.states import JobState


def test_a_job_is_accepted_with_where_and_when_to_ask(api):
    response = api.http.post("/v1/jobs", json=api.request(name="mine", labels={"team": "a"}))
    job = response.json()
    assert response.status_code == 202
    assert response.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert response.headers["Retry-After"].isdigit()
    assert (job["state"], job["kind"], job["request"]["labels"]) == ("queued", "search", {"team": "a"})
    assert api.http.get(response.headers["Location"]).json() == job


def test_what_is_left_out_has_documented_defaults(api):
    request = api.submit()["request"]
    assert (request["metrics"], request["samples"], request["task"], request["gap"]) == (
        ["output_kl"],
        64,
        "auto",
        1e-9,
    )


@pytest.mark.parametrize(
    ("members", "slug", "pointer"),
    [
        ({"schemes": ["w4", "w9"]}, "unknown-scheme", "/schemes/1"),
        ({"schemes": ["w4a8"]}, "unknown-scheme", "/schemes/0"),
        ({"schemes": ["w4", "w4-channel"]}, "repeated-value", "/schemes"),
        ({"schemes": []}, "invalid-request", "/schemes"),
        ({"budgets": ["lots"]}, "invalid-budget", "/budgets/0"),
        ({"budgets": ["0 bpw"]}, "invalid-budget", "/budgets/0"),
        ({"budgets": ["-1 GiB"]}, "invalid-budget", "/budgets/0"),
        ({"budgets": ["NaN bpw"]}, "invalid-budget", "/budgets/0"),
        ({"budgets": ["1e400 GB"]}, "invalid-budget", "/budgets/0"),
        ({"budgets": []}, "invalid-request", "/budgets"),
        ({"limits": ["4 bpw", "nonsense"]}, "invalid-budget", "/limits/1"),
        ({"metrics": ["beauty"]}, "unknown-metric", "/metrics/0"),
        ({"task": "poetry"}, "unknown-task", "/task"),
        ({"pins": {"a.q": "w99"}}, "unknown-scheme", "/pins/a.q"),
        ({"samples": 7}, "invalid-request", "/samples"),
        ({"samples": 100_001}, "invalid-request", "/samples"),
        ({"samples": "64"}, "invalid-request", "/samples"),
        ({"samples": True}, "invalid-request", "/samples"),
        ({"seed": 2**63}, "invalid-request", "/seed"),
        ({"device": "tpu"}, "invalid-request", "/device"),
        ({"unknown": 1}, "invalid-request", "/unknown"),
        ({"user_metric": "os:getcwd"}, "invalid-request", "/user_metric"),
        ({"model": "model_0"}, "unknown-model", "/model"),
        ({"calibration": "cal_0"}, "unknown-calibration", "/calibration"),
        ({"budgets": ["latency<=3 ms"]}, "missing-latency", "/latency"),
        ({"role_limits": {"*.q": "latency<=3 ms"}}, "missing-latency", "/latency"),
        ({"role_limits": {"*.q": "uniform w3"}}, "unknown-scheme", ""),
        ({"latency_ns": {"a.q": {"w9": 1}}}, "invalid-latency", "/latency_ns"),
        ({"latency_ns": {"a.q": {"w4": -1}}}, "invalid-request", "/latency_ns/a.q/w4"),
        ({"task": "generic", "metrics": ["hessian_trace"]}, "metric-not-offered", "/metrics/0"),
        (
            {"task": "generic", "metrics": ["metric_decoupled"], "role_metrics": {"head": "ssim"}},
            "metric-not-offered",
            "/role_metrics/head",
        ),
        ({"role_metrics": {"head": "sqnr"}}, "unused-metric", ""),
        ({"roles": {"*": "hero"}}, "unknown-role", "/roles/*"),
        ({"ratios": [-1]}, "invalid-request", "/ratios/0"),
        ({"objective": "best"}, "invalid-objective", "/objective"),
        ({"objective": "uncertainty: -1"}, "invalid-objective", "/objective"),
        ({"objective": "worst: output_kl, sqnr"}, "invalid-objective", ""),
        ({"limits": ["sqnr>=3"]}, "invalid-budget", ""),
        ({"objective": "quadratic"}, "invalid-objective", ""),
        ({"forbid": {"a.*": ["w3"]}}, "unknown-scheme", ""),
        ({"forbid": {"a.*": ["kv-full"]}}, "missing-cache-types", ""),
        ({"forbid": {"a.*": "w2"}}, "invalid-request", "/forbid/a.*"),
    ],
)
def test_a_bad_request_is_refused_with_the_place(api, members, slug, pointer):
    response = api.http.post("/v1/jobs", json=api.request(**members))
    problem = response.json()
    assert (response.status_code, problem["type"]) == (422, f"urn:bitplan:problem:{slug}"), problem
    assert problem["pointer"] == pointer
    assert len(problem["detail"]) > 20


@pytest.mark.parametrize("text", ['{"gap": NaN}', '{"gap": Infinity}', '{"gap": 1e999}'])
def test_numbers_that_are_none_are_refused(api, text):
    response = api.http.post("/v1/jobs", content=text, headers={"Content-Type": "application/json"})
    assert response.status_code in {400, 422}
    assert response.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({"pins": {"nowhere": "w4"}}, "/pins/nowhere"),
        ({"ties": [["a.*", "c.*"]]}, "/ties/0/1"),
        ({"exclude": ["zzz*"]}, "/exclude/0"),
        ({"include": ["zzz*"]}, "/include/0"),
        ({"protect": ["a.*", "zzz*"]}, "/protect/1"),
        ({"forbid": {"a.*": ["w2"], "zzz*": ["w4"]}}, "/forbid/zzz*"),
        ({"roles": {"zzz*": "head"}}, "/roles/zzz*"),
        (
            {"metrics": ["metric_decoupled"], "role_metrics": {"head": "sqnr", "zzz": "sqnr"}},
            "/role_metrics/zzz",
        ),
    ],
)
def test_patterns_that_match_nothing_are_refused_once_the_model_is_known(api, runner, members, pointer):
    request = api.request(**members)
    runner.verify(request["model"])
    problem = api.http.post("/v1/jobs", json=request).json()
    assert (problem["type"], problem["pointer"]) == ("urn:bitplan:problem:unknown-layer", pointer)
    assert "Names are like" in problem["detail"]


def test_patterns_that_match_are_taken(api, runner):
    request = api.request(
        pins={"a.*": "w8"}, ties=[["a.q", "a.k"]], include=["lm_head", "tied_*"], exclude=["b.up"]
    )
    runner.verify(request["model"])
    assert api.http.post("/v1/jobs", json=request).status_code == 202


def test_a_rejected_or_deleted_model_is_not_used(api, runner):
    from service.db.repositories import models
    from service.states import InputState

    request = api.request()
    with api.context.database.write() as session:
        models.set_state(session, request["model"], InputState.REJECTED, problem={"detail": "NaN in a.q."})
    rejected = api.http.post("/v1/jobs", json=request)
    assert (rejected.status_code, rejected.json()["cause"]) == (409, {"detail": "NaN in a.q."})
    with api.context.database.write() as session:
        models.set_state(session, request["model"], InputState.DELETED)
    assert api.http.post("/v1/jobs", json=request).json()["type"].endswith("unknown-model")


def test_an_unchanged_job_is_answered_304(api, runner):
    job = api.submit()
    path = f"/v1/jobs/{job['id']}"
    etag = api.http.get(path).headers["ETag"]
    same = api.http.get(path, headers={"If-None-Match": etag})
    assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", etag)
    runner.start(job["id"])
    changed = api.http.get(path, headers={"If-None-Match": etag})
    assert (changed.status_code, changed.json()["progress"]["total"]) == (200, 10)
    assert changed.headers["ETag"] != etag


def test_waiting_is_answered_on_the_change(api, runner):
    job = api.submit()
    path = f"/v1/jobs/{job['id']}"
    etag = api.http.get(path).headers["ETag"]
    timer = threading.Timer(0.3, runner.start, [job["id"]])
    timer.start()
    response = api.http.get(path, headers={"If-None-Match": etag, "Prefer": "wait=20"})
    timer.join()
    assert (response.status_code, response.json()["state"]) == (200, "running")


def test_a_finished_job_has_no_retry_after(api, finished_job):
    response = api.http.get(f"/v1/jobs/{finished_job['id']}", headers={"Prefer": "wait=30"})
    assert response.json()["state"] == "succeeded"
    assert "Retry-After" not in response.headers


def test_cancel_keeps_cancelled(api):
    job = api.submit()
    first = api.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert (first.status_code, first.json()["state"]) == (202, "cancelled")
    assert api.http.post(f"/v1/jobs/{job['id']}/cancel").json() == first.json()


def test_a_running_job_is_cancelling_first(api, runner):
    job = api.submit()
    runner.start(job["id"])
    body = api.http.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert (body["state"], body["cancel_requested"]) == ("cancelling", True)


def test_a_finished_job_is_not_cancelled(api, finished_job):
    response = api.http.post(f"/v1/jobs/{finished_job['id']}/cancel")
    assert (response.status_code, response.json()["type"]) == (409, "urn:bitplan:problem:job-finished")


def test_resume_names_its_predecessor(api, runner):
    job = api.submit()
    held = runner.start(job["id"])
    runner.finish(held, JobState.FAILED, problem={"detail": "a worker crashed"})
    response = api.http.post(f"/v1/jobs/{job['id']}/resume")
    resumed = response.json()
    assert (response.status_code, resumed["predecessor"], resumed["state"]) == (202, job["id"], "queued")
    assert resumed["request"] == job["request"]
    assert resumed["id"] != job["id"]


def test_only_an_ended_job_that_failed_is_resumed(api, finished_job):
    running = api.submit(seed=1)
    for job_id in (finished_job["id"], running["id"]):
        response = api.http.post(f"/v1/jobs/{job_id}/resume")
        assert (response.status_code, response.json()["type"]) == (
            409,
            "urn:bitplan:problem:job-not-resumable",
        )


def test_only_a_finished_job_is_deleted(api, finished_job):
    running = api.submit(seed=1)
    assert api.http.delete(f"/v1/jobs/{running['id']}").status_code == 409
    assert api.http.delete(f"/v1/jobs/{finished_job['id']}").status_code == 204
    assert api.http.get(f"/v1/jobs/{finished_job['id']}").status_code == 404


def test_jobs_come_in_pages_the_newest_first(api):
    request = api.request()
    ids = [api.http.post("/v1/jobs", json=request | {"seed": seed}).json()["id"] for seed in range(5)]
    seen, cursor = [], None
    while True:
        page = api.http.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ids[::-1]


def test_jobs_are_listed_by_state(api, finished_job):
    api.submit(seed=1)
    items = api.http.get("/v1/jobs", params={"state": "succeeded"}).json()["items"]
    assert [job["id"] for job in items] == [finished_job["id"]]


def test_a_listed_job_is_what_its_own_address_gives(api, finished_job):
    """Members and their text: lists are written without the model that answers a poll."""
    listed = api.http.get("/v1/jobs")
    assert api.http.get(f"/v1/jobs/{finished_job['id']}").text in listed.text


def test_listed_scores_have_the_members_that_are_documented(api, finished_job):
    items = api.http.get(f"/v1/jobs/{finished_job['id']}/scores").json()["items"]
    assert items
    assert all(Score.model_validate(item).model_dump() == item for item in items)


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 201}, {"limit": "x"}, {"state": "sleeping"}])
def test_bad_queries_are_refused(api, params):
    response = api.http.get("/v1/jobs", params=params)
    assert response.status_code == 422
    assert response.json()["pointer"] == f"/query/{next(iter(params))}"


def test_cursors_cannot_be_made_or_carried_over(api):
    request = api.request()
    for seed in range(2):
        api.http.post("/v1/jobs", json=request | {"seed": seed})
    cursor = api.http.get("/v1/jobs", params={"limit": 1}).json()["next_cursor"]
    tampered = cursor[:-2] + ("AA" if cursor[-2:] != "AA" else "BB")
    for path, text in (
        ("jobs", tampered),
        ("jobs", "nonsense"),
        ("jobs", "é"),
        ("models", cursor),
        ("jobs", ""),
    ):
        response = api.http.get(f"/v1/{path}", params={"cursor": text})
        assert (response.status_code, response.json()["type"]) == (400, "urn:bitplan:problem:invalid-cursor")


def test_events_tell_the_story_in_order(api, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/events"
    events = api.http.get(path).json()["items"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert (events[0]["type"], events[-1]["type"]) == ("queued", "succeeded")
    first = api.http.get(path, params={"limit": 2}).json()
    rest = api.http.get(path, params={"cursor": first["next_cursor"]}).json()
    assert first["items"] + rest["items"] == events


@pytest.mark.parametrize("part", ["", "/events", "/scores", "/plans"])
def test_unknown_jobs_are_not_found(api, part):
    assert api.http.get(f"/v1/jobs/job_0{part}").json()["type"] == "urn:bitplan:problem:job-not-found"


def later(**span):
    return (datetime.now(UTC) + timedelta(**span)).isoformat()


def test_a_job_may_have_a_deadline(api):
    deadline = later(hours=1)
    job = api.submit(deadline=deadline)
    assert datetime.fromisoformat(job["deadline"]) == datetime.fromisoformat(deadline)
    assert "deadline" not in job["request"]
    assert api.submit()["deadline"] is None


@pytest.mark.parametrize(
    "deadline",
    [
        "2026-11-01T00:00:00Z",
        "9999-12-31T23:59:59-23:59",
        "2026-12-01",
        "2030-01-01T00:00:00",
        "soon",
        1.9e9,
        [],
    ],
)
def test_other_deadlines_are_refused(api, deadline):
    response = api.http.post("/v1/jobs", json=api.request(deadline=deadline))
    problem = response.json()
    assert (response.status_code, problem["type"], problem["pointer"]) == (
        422,
        "urn:bitplan:problem:invalid-deadline",
        "/deadline",
    )


def test_a_resumed_job_has_a_deadline_of_its_own(api):
    first = api.submit(deadline=later(hours=1))
    api.http.post(f"/v1/jobs/{first['id']}/cancel")
    path, deadline = f"/v1/jobs/{first['id']}/resume", later(hours=2)
    assert api.http.post(path).json()["deadline"] is None
    given = api.http.post(path, json={"deadline": deadline}).json()["deadline"]
    assert datetime.fromisoformat(given) == datetime.fromisoformat(deadline)
    assert api.http.post(path, json={"deadline": later(hours=-1)}).status_code == 422


def test_a_key_stands_for_one_deadline(api):
    request, key = api.request(), {"Idempotency-Key": "k"}
    first = api.http.post("/v1/jobs", json={**request, "deadline": later(hours=1)}, headers=key)
    assert first.status_code == 202
    other = api.http.post("/v1/jobs", json={**request, "deadline": later(hours=2)}, headers=key)
    assert other.json()["type"] == "urn:bitplan:problem:idempotency-key-reused"
