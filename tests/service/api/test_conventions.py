from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from service.api.cursors import Cursors, load_secret
from service.api.scores import cell
from service.app import create_app, open_context
from service.errors import NotFound, json_pointer, slug_of
from service.settings import Settings


def test_unknown_paths_and_methods_are_problems(api):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/jobs", 405),
        ("GET", "/v2", 404),
    ):
        response = api.http.request(method, path)
        assert response.status_code == status
        assert response.headers["Content-Type"] == "application/problem+json"
        assert {"type", "title", "status", "detail", "instance"} <= set(response.json())


def test_an_unexpected_error_shows_nothing_of_the_inside(settings, monkeypatch):
    app = create_app(settings)

    @app.get("/broken")
    def broken():
        raise RuntimeError("secret at 0x1234")

    with TestClient(app, raise_server_exceptions=False) as http:
        response = http.get("/broken")
    assert (response.status_code, response.json()["type"]) == (500, "urn:bitplan:problem:internal-error")
    assert "secret" not in response.text


@pytest.mark.parametrize(
    "error",
    [OperationalError("SELECT secret", {}, Exception("database is locked")), NoConnection("all are taken")],
)
def test_a_database_error_is_503_with_retry_after(settings, error):
    app = create_app(settings)

    @app.get("/locked")
    def locked():
        raise error

    with TestClient(app) as http:
        response = http.get("/locked")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert "SELECT" not in response.text


@pytest.mark.parametrize("text", ["{", "[1,", "", "\xff"])
def test_a_body_that_is_no_json_is_refused(api, text):
    response = api.http.post(
        "/v1/jobs", content=text.encode("latin-1"), headers={"Content-Type": "application/json"}
    )
    assert response.status_code in {400, 422}
    assert response.headers["Content-Type"] == "application/problem+json"


def test_all_faults_of_a_request_are_listed(api):
    body = api.request(samples=1, seed=-1, schemes=["w99"])
    problem = api.http.post("/v1/jobs", json=body).json()
    assert {fault["pointer"] for fault in problem["errors"]} == {"/samples", "/seed", "/schemes/0"}


def test_the_same_key_and_body_are_answered_the_same(api):
    body, headers = api.request(), {"Idempotency-Key": "k1"}
    first = api.http.post("/v1/jobs", json=body, headers=headers)
    again = api.http.post("/v1/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["Location"] == first.headers["Location"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert len(api.http.get("/v1/jobs").json()["items"]) == 1


def test_the_same_key_with_another_body_is_refused(api):
    body, headers = api.request(), {"Idempotency-Key": "k1"}
    api.http.post("/v1/jobs", json=body, headers=headers)
    response = api.http.post("/v1/jobs", json=body | {"seed": 1}, headers=headers)
    assert (response.status_code, response.json()["type"]) == (
        422,
        "urn:bitplan:problem:idempotency-key-reused",
    )


def test_a_key_whose_first_request_is_running_is_refused(api, monkeypatch):
    from service.api import jobs

    body, headers = api.request(), {"Idempotency-Key": "k1"}
    during = []
    check = jobs.check_job

    def check_and_repeat(*arguments):
        during.append(api.http.post("/v1/jobs", json=body, headers=headers))
        check(*arguments)

    monkeypatch.setattr(jobs, "check_job", check_and_repeat)
    assert api.http.post("/v1/jobs", json=body, headers=headers).status_code == 202
    (response,) = during
    assert (response.status_code, response.headers["Retry-After"]) == (409, "1")
    assert response.json()["type"] == "urn:bitplan:problem:idempotency-key-in-use"
    assert api.http.post("/v1/jobs", json=body, headers=headers).headers["Idempotent-Replayed"] == "true"


def test_a_failed_request_gives_its_key_back(api):
    body, headers = api.request(), {"Idempotency-Key": "k1"}
    assert api.http.post("/v1/jobs", json=body | {"model": "model_0"}, headers=headers).status_code == 422
    assert api.http.post("/v1/jobs", json=body, headers=headers).status_code == 202


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_bad_key_is_refused(api, key):
    assert api.http.post("/v1/jobs", json=api.request(), headers={"Idempotency-Key": key}).status_code == 422


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("formats", "w<bits>"),
        ("metrics-catalog", "output_kl"),
        ("solvers", "highs"),
        ("tasks", "causal_lm"),
        ("limits", "3.5 bpw"),
    ],
)
def test_the_vocabulary_comes_from_the_catalogs(api, path, name):
    response = api.http.get(f"/v1/{path}")
    assert response.status_code == 200
    assert name in response.text


def test_every_catalog_entry_is_listed(api):
    from search.catalog import SOLVERS
    from sensitivity.catalog import SCORERS, TASKS

    for path, catalog in (("metrics-catalog", SCORERS), ("tasks", TASKS), ("solvers", SOLVERS)):
        items = api.http.get(f"/v1/{path}").json()["items"]
        assert [item["name"] for item in items] == list(catalog)
        assert all(item["summary"] for item in items)


def test_health(api):
    assert api.http.get("/healthz").json() == {"status": "ok"}
    assert api.http.get("/readyz").json()["status"] == "ready"


def test_formulas_do_not_reach_a_spreadsheet():
    assert [cell(text) for text in ("=a", "+a", "-a", "@a", "a=")] == ["'=a", "'+a", "'-a", "'@a", "a="]


def test_one_secret_signs_the_cursors_of_a_data_directory(tmp_path):
    secret = load_secret(tmp_path / "cursor.key")
    assert load_secret(tmp_path / "cursor.key") == secret
    assert (tmp_path / "cursor.key").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cursor.key"]
    cursor = Cursors(secret).make("jobs", 7)
    assert Cursors(secret).read("jobs", cursor) == 7


def test_a_database_newer_than_the_code_is_refused(tmp_path):
    from sqlalchemy import text

    from service.db.migrate import DatabaseTooNew

    settings = Settings(data_dir=tmp_path)
    context = open_context(settings)
    with context.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'from_the_future'"))
    context.database.close()
    with pytest.raises(DatabaseTooNew, match="from_the_future"):
        open_context(settings)


def test_pointers_and_slugs():
    assert json_pointer("a/b", "c~d", 3) == "/a~1b/c~0d/3"
    assert slug_of(NotFound("job-not-found", "x").as_json()) == "job-not-found"


def test_the_api_and_the_client_load_no_torch_and_write_nothing(tmp_path):
    modules = "service.client, service.planning.answer, service.wire, service.app"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = {"BITPLAN_DATA_DIR": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_the_committed_openapi_document_is_the_apps(api, pytestconfig):
    committed = json.loads((pytestconfig.rootpath / "docs" / "openapi.json").read_text())
    assert api.http.get("/openapi.json").json() == committed, "Run: python -m service.api.openapi"


def test_the_page_of_the_api_names_every_path(api, pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "api.md").read_text()
    paths = api.http.get("/openapi.json").json()["paths"]
    named = [re.sub(r"\{\w+_id\}", "{id}", path) for path in paths]
    assert [path for path in named if f"`{path}`" not in page] == []
