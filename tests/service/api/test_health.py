"""/readyz, /metrics, request ids: what monitoring sees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from service import metrics
from service.app import create_app
from service.db.repositories import jobs, leases, runners, uploads
from service.db.repositories.leases import Owner
from service.states import JobKind

RUNNER = Owner("a" * 32, "web/pid:[1]", 7, "process")
MINUTES = 600


def samples(response):
    """(name, labels without le) -> value; the page must be what Prometheus reads, each family once."""
    families = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def checks(response):
    return {name: line.partition(":")[0] for name, line in response.json()["checks"].items()}


def test_ready_says_what_was_checked(api):
    response = api.http.get("/readyz")
    assert response.status_code == 200
    assert checks(response) == {"database": "ok", "schema": "ok", "store": "ok", "runner": "warning"}
    assert "none is known: jobs wait until `bitplan runner` is started" in response.json()["checks"]["runner"]
    assert str(api.context.settings.data_dir) not in response.text


def test_a_runner_can_be_required(api):
    assert api.http.get("/readyz?require=runner").status_code == 503
    with api.context.database.write() as session:
        runners.beat(session, RUNNER, "1", "")
    assert api.http.get("/readyz?require=runner").json()["checks"]["runner"] == "ok: 1 alive"
    with api.context.database.write() as session:
        session.execute(text(f"UPDATE runners SET seen_at = seen_at - {MINUTES}"))
    response = api.http.get("/readyz?require=runner")
    assert response.status_code == 503
    assert re.search(r"runner: the last one was seen 60\d s ago", response.json()["detail"])
    assert api.http.get("/readyz").status_code == 200
    assert api.http.get("/readyz?require=luck").status_code == 422


def test_not_ready_without_its_database(api, monkeypatch):
    def broken():
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    monkeypatch.setattr(type(api.context.database), "read", lambda self: broken())
    response = api.http.get("/readyz")
    assert (response.status_code, response.json()["type"]) == (503, "urn:bitplan:problem:not-ready")
    assert response.headers["Retry-After"] == "5"
    assert checks(response) == {"database": "failed", "store": "ok"}
    assert api.http.get("/healthz").status_code == 200


def test_not_ready_with_another_schema(api):
    with api.context.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    response = api.http.get("/readyz")
    assert response.status_code == 503
    assert "schema: DatabaseTooNew. Run `bitplan migrate`" in response.json()["detail"]


def test_not_ready_without_room(settings):
    full = settings.model_copy(update={"least_free_bytes": 2**62})
    with TestClient(create_app(full)) as http:
        response = http.get("/readyz")
    assert response.status_code == 503
    assert "Make room: `bitplan gc`" in response.json()["detail"]


def test_not_ready_when_the_store_cannot_be_written(api, settings):
    folder = settings.data_dir / "tmp"
    assert not folder.exists()
    folder.write_text("in the way")
    assert checks(api.http.get("/readyz"))["store"] == "failed"


def test_metrics_tell_of_the_database_and_of_this_process(api):
    with api.context.database.write() as session:
        for _ in range(3):
            jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d")
        leases.claim(session, RUNNER, 60)
        leases.claim(session, RUNNER, -1)
        uploads.record_blob(session, "a" * 64, 11)
    api.http.get("/v1/jobs?state=queued")
    api.http.get("/nowhere")
    found = samples(api.http.get("/metrics"))
    assert found["bitplan_queue_depth",] == 1
    assert 0 <= found["bitplan_queue_oldest_seconds",] < MINUTES
    assert (found["bitplan_leases",], found["bitplan_leases_expired",]) == (2, 1)
    assert found["bitplan_jobs", ("kind", "search"), ("state", "running")] == 2
    assert (found["bitplan_blobs",], found["bitplan_blob_bytes",]) == (1, 11)
    assert found["bitplan_store_free_bytes",] > 0
    listed = ("method", "GET"), ("route", "/v1/jobs"), ("status", "200")
    assert found["bitplan_http_requests_total", *listed] >= 1
    assert found["bitplan_http_requests_total", ("method", "GET"), ("route", "none"), ("status", "404")] >= 1
    assert found["bitplan_http_request_seconds_count", *listed[:2]] >= 1


def test_metrics_tell_what_each_runner_told(api):
    metrics.WORKER_DEATHS.inc()
    metrics.UNIT_SECONDS.labels("score").observe(0.5)
    silent = Owner("b" * 32, "web", 8, "process")
    with api.context.database.write() as session:
        for owner in (silent, RUNNER):
            runners.beat(session, owner, "1", metrics.of_runner())
        session.execute(text(f"UPDATE runners SET seen_at = seen_at - {MINUTES} WHERE pid = 8"))
    response = api.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found, one, other = samples(response), ("runner", "web:7:aaaaaa"), ("runner", "web:8:bbbbbb")
    assert (found["bitplan_runner_up", one], found["bitplan_runner_up", other]) == (1, 0)
    assert found["bitplan_runner_seen_seconds", other] >= MINUTES
    for runner in (one, other):
        assert found["bitplan_worker_deaths_total", runner] >= 1
        assert found["bitplan_unit_seconds_count", ("kind", "score"), runner] >= 1


def test_metrics_count_solves_and_kept_inputs(api, finished_job):
    before = samples(api.http.get("/metrics"))
    for budget in ("5 bpw", "6 bpw"):
        path = f"/v1/jobs/{finished_job['id']}/plans"
        assert api.http.post(path, json={"budgets": [budget]}).status_code == 201
    after = samples(api.http.get("/metrics"))

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("bitplan_resolve_seconds_count") == 2
    assert grown("bitplan_planning_inputs_total", ("result", "miss")) == 1
    assert grown("bitplan_planning_inputs_total", ("result", "hit")) == 1


def lines(captured):
    return [json.loads(line) for line in captured.err.splitlines() if line.startswith("{")]


def test_a_request_has_one_id_in_answer_and_log(api, capsys):
    body = api.request()
    capsys.readouterr()
    response = api.http.post("/v1/jobs", json=body, headers={"X-Request-ID": "deploy-17"})
    assert response.headers["X-Request-ID"] == "deploy-17"
    told = [line for line in lines(capsys.readouterr()) if line.get("request_id") == "deploy-17"]
    assert [line["event"] for line in told] == ["job.accepted", "request"]
    assert told[0]["job"] == response.json()["id"]
    assert (told[1]["method"], told[1]["path"], told[1]["status"]) == ("POST", "/v1/jobs", 202)


@pytest.mark.parametrize("given", ["two words", "x" * 65, 'in"jected', ""])
def test_an_id_that_does_not_belong_in_a_log_is_replaced(api, given):
    made = api.http.get("/v1/jobs", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert re.fullmatch("[0-9a-f]{32}", made)


def test_queries_are_not_logged_and_monitoring_is_quiet(api, capsys):
    api.http.get("/v1/jobs?cursor=secret")
    api.http.get("/metrics")
    written = capsys.readouterr().err
    assert '"path": "/v1/jobs"' in written
    assert "secret" not in written
    assert "/metrics" not in written


def test_what_nobody_foresaw_has_its_id_too(settings: object, monkeypatch, capsys):
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as http:
        monkeypatch.setattr(jobs, "list_page", lambda *_, **__: 1 / 0)
        response = http.get("/v1/jobs")
    assert response.status_code == 500
    ident = response.headers["X-Request-ID"]
    told = [line for line in lines(capsys.readouterr()) if line.get("request_id") == ident]
    assert {line["event"] for line in told} >= {"unexpected error", "request"}
    assert [line["status"] for line in told if line["event"] == "request"] == [500]


def test_libraries_log_in_the_same_form(api, capsys, tmp_path: Path):
    import logging

    logging.getLogger("uvicorn.error").warning("a word of the server")
    (line,) = [line for line in lines(capsys.readouterr()) if "word of the server" in line["event"]]
    assert (line["level"], "timestamp" in line) == ("warning", True)
