"""POST /v1/models of a hub: what is asked for is checked at once, what the hub has by a runner."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.db.repositories import jobs, models
from service.settings import Settings
from service.states import InputState, JobKind
from tests.service.hub_server import COMMIT, REPOSITORY

WANTED = {"repository": REPOSITORY, "commit": COMMIT}


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(
        data_dir=tmp_path / "data", hub=True, hub_offline=False, hub_endpoint="http://127.0.0.1:1"
    )


def queued(api):
    with api.context.database.read() as session:
        return [job for job in jobs.unfinished(session) if job.kind == JobKind.VERIFY_MODEL]


def test_a_model_of_a_hub_waits_for_a_runner(api):
    response = api.http.post("/v1/models", json={"hub": WANTED})
    assert response.status_code == 201, response.text
    model = response.json()
    assert (model["state"], model["summary"]) == ("verifying", None)
    assert model["source"] == {"kind": "hub", **WANTED, "folder": ""}
    assert [job.request["model"] for job in queued(api)] == [model["id"]]
    again = api.http.post("/v1/models", json={"hub": WANTED})
    assert again.json()["id"] == model["id"]
    assert len(queued(api)) == 1
    other = api.http.post("/v1/models", json={"hub": {**WANTED, "folder": "unet"}})
    assert other.json()["id"] != model["id"]


@pytest.mark.parametrize(
    ("hub", "slug", "pointer"),
    [
        ({"repository": "https://huggingface.co/a/b"}, "invalid-hub-id", "/hub/repository"),
        ({"repository": "file:///etc/passwd"}, "invalid-hub-id", "/hub/repository"),
        ({"repository": "../../etc"}, "invalid-hub-id", "/hub/repository"),
        ({"repository": "gpt2"}, "invalid-hub-id", "/hub/repository"),
        ({"commit": "main"}, "moving-revision", "/hub/commit"),
        ({"commit": "v1.0"}, "moving-revision", "/hub/commit"),
        ({"commit": COMMIT[:8]}, "moving-revision", "/hub/commit"),
        ({"folder": "../x"}, "invalid-hub-id", "/hub/folder"),
        ({"commit": None}, "invalid-request", "/hub/commit"),
        ({"token": "hf_x"}, "invalid-request", "/hub/token"),
    ],
)
def test_what_names_no_commit_is_refused(api, hub, slug, pointer):
    response = api.http.post("/v1/models", json={"hub": WANTED | hub})
    problem = response.json()
    assert response.status_code == 422
    assert problem["type"].endswith(slug)
    assert problem["pointer"] == pointer
    assert "git ls-remote" in problem["detail"] or slug != "moving-revision"
    assert queued(api) == []


def test_two_sources_are_one_too_many(api):
    body = {"hub": WANTED, "folder": "/x"}
    assert api.http.post("/v1/models", json=body).json()["type"].endswith("invalid-source")


@pytest.mark.parametrize(
    ("more", "slug"), [({"hub": False}, "hub-not-offered"), ({"hub_offline": True}, "hub-offline")]
)
def test_without_leave_there_is_no_hub(settings, more, slug):
    with TestClient(create_app(settings.model_copy(update=more))) as http:
        response = http.post("/v1/models", json={"hub": WANTED})
        assert response.status_code == 422
        assert response.json()["type"].endswith(slug)


def test_the_hub_is_closed_unless_opened(tmp_path):
    assert Settings(data_dir=tmp_path).hub is False


def test_jobs_wait_until_the_model_was_fetched(api):
    model = api.http.post("/v1/models", json={"hub": WANTED}).json()["id"]
    for path, body in (
        ("/v1/jobs", api.request() | {"model": model}),
        (f"/v1/models/{model}/calibrations", {"method": "gaussian"}),
    ):
        response = api.http.post(path, json=body)
        assert response.status_code in (409, 422), response.text
        if response.status_code == 409:
            assert response.json()["type"].endswith("model-not-ready")
            assert response.headers["Retry-After"] == "5"
    assert api.http.get(f"/v1/models/{model}/layers").status_code == 409


def test_a_cancelled_fetch_can_be_asked_for_again(api):
    model = api.http.post("/v1/models", json={"hub": WANTED}).json()["id"]
    [job] = queued(api)
    assert api.http.post(f"/v1/jobs/{job.id}/cancel").status_code == 202
    assert queued(api) == []
    assert api.http.post("/v1/models", json={"hub": WANTED}).json()["id"] == model
    assert len(queued(api)) == 1


def test_a_rejected_one_makes_room_for_another(api):
    model = api.http.post("/v1/models", json={"hub": WANTED}).json()["id"]
    with api.context.database.write() as session:
        models.set_state(session, model, InputState.REJECTED, problem={"detail": "gone", "status": 404})
    assert api.http.post("/v1/models", json={"hub": WANTED}).json()["id"] != model
