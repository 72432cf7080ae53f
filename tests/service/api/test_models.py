from __future__ import annotations

from pathlib import Path

import pytest

from service.db.repositories import jobs
from service.states import JobKind


def test_a_model_is_made_of_an_upload(api, model_files):
    upload = api.send(model_files)
    response = api.http.post("/v1/models", json={"upload": upload["id"]})
    assert response.status_code == 201
    assert api.http.get(response.headers["Location"]).json()["id"] == response.json()["id"]


def test_a_model_is_made_of_a_folder_of_the_server(api, settings, model_files):
    folder: Path = settings.model_folders[0] / "mine"
    folder.mkdir(parents=True)
    for name, data in model_files.items():
        (folder / name).write_bytes(data)
    response = api.http.post("/v1/models", json={"folder": str(folder)})
    assert response.status_code == 201, response.text
    assert response.json()["source"]["kind"] == "folder"
    assert response.json()["digest"] == api.http.get(f"/v1/models/{api.model()}").json()["digest"]


@pytest.mark.parametrize(
    ("body", "slug"),
    [
        ({}, "invalid-source"),
        ({"upload": "upload_1", "folder": "/x"}, "invalid-source"),
        ({"upload": "upload_1"}, "upload-not-found"),
        ({"folder": "/etc"}, "folder-not-allowed"),
        ({"hub": "someone/model"}, "invalid-request"),
    ],
)
def test_other_sources_are_refused(api, body, slug):
    problem = api.http.post("/v1/models", json=body).json()
    assert problem["type"] == f"urn:bitplan:problem:{slug}"


def test_an_upload_of_another_purpose_is_refused(api):
    upload = api.send({"c.txt": b"a\nb\n"}, "calibration")
    assert api.http.post("/v1/models", json={"upload": upload["id"]}).json()["type"].endswith("wrong-purpose")


def test_a_model_whose_verification_was_cancelled_is_verified_when_it_is_sent_again(api):
    def verifications():
        with api.context.database.read() as session:
            found = jobs.list_kind(session, JobKind.VERIFY_MODEL, api.context.tenant)
        return [job for job in found if not job.finished]

    model = api.model()
    assert api.model() == model
    [job] = verifications()
    assert api.http.post(f"/v1/jobs/{job.id}/cancel").json()["state"] == "cancelled"
    assert verifications() == []
    assert api.model() == model
    assert len(verifications()) == 1


def test_layers_are_known_after_verification(api, runner):
    model = api.model()
    early = api.http.get(f"/v1/models/{model}/layers")
    assert (early.status_code, early.headers["Retry-After"]) == (409, "1")
    assert api.http.get(f"/v1/models/{model}").headers["Retry-After"] == "1"
    runner.verify(model)
    ready = api.http.get(f"/v1/models/{model}")
    assert (ready.json()["state"], "Retry-After" in ready.headers) == ("ready", False)
    assert "inventory" not in ready.json()["summary"]
    layers = api.http.get(f"/v1/models/{model}/layers").json()
    assert [layer["name"] for layer in layers["layers"]] == ["a.q", "a.k", "b.up", "b.down"]
    assert layers["excluded"][0]["reason"].startswith("output head")


def test_a_model_is_deleted(api):
    model = api.model()
    assert api.http.delete(f"/v1/models/{model}").status_code == 204
    assert api.http.get(f"/v1/models/{model}").status_code == 404
    assert api.http.get("/v1/models").json()["items"] == []


def test_a_model_or_calibration_in_use_is_not_deleted(api):
    job = api.submit()
    for path in (
        f"/v1/models/{job['request']['model']}",
        f"/v1/calibrations/{job['request']['calibration']}",
    ):
        response = api.http.delete(path)
        assert response.status_code == 409
        assert job["id"] in response.json()["detail"]
    api.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert api.http.delete(path).status_code == 204


def test_what_any_job_still_reads_is_not_deleted(api, runner, finished_job):
    model, calibration = (finished_job["request"][kind] for kind in ("model", "calibration"))
    plan = api.http.get(f"/v1/jobs/{finished_job['id']}/plans").json()["items"][0]["id"]
    of_plan = {"plan": plan, "job": finished_job["id"]}
    asked = {
        JobKind.MEASURE_PLAN: of_plan,
        JobKind.WRITE_CHECKPOINT: {**of_plan, "consumer": "vllm", "force": False},
        JobKind.CORRELATE: {"search": finished_job["request"], "job": finished_job["id"]},
        JobKind.MAKE_CALIBRATION: {"model": model, "method": "random_tokens"},
    }
    for kind, request in asked.items():
        with api.context.database.write() as session:
            job = jobs.create(session, kind=kind, request=request, request_digest="d")
        for path in (f"models/{model}", f"calibrations/{calibration}"):
            if kind != JobKind.MAKE_CALIBRATION or path.startswith("models"):
                refused = api.http.delete(f"/v1/{path}")
                assert (refused.status_code, job.id in refused.text) == (409, True), kind
        assert api.http.post(f"/v1/jobs/{job.id}/cancel").status_code == 202
    assert api.http.delete(f"/v1/models/{model}").status_code == 204
    assert api.http.delete(f"/v1/calibrations/{calibration}").status_code == 204


def test_calibrations_are_listed_and_deleted(api):
    calibration = api.calibration()
    assert [item["id"] for item in api.http.get("/v1/calibrations").json()["items"]] == [calibration]
    assert api.http.get(f"/v1/calibrations/{calibration}").json()["summary"]["rows"] == 20
    assert api.http.delete(f"/v1/calibrations/{calibration}").status_code == 204
    assert api.http.get(f"/v1/calibrations/{calibration}").status_code == 404


def test_a_calibration_is_made_of_an_upload(api):
    upload = api.send({"c.txt": b"".join(b"line %d\n" % n for n in range(9))}, "calibration")
    response = api.http.post("/v1/calibrations", json={"upload": upload["id"]})
    assert (response.status_code, response.json()["kind"]) == (201, "text")


@pytest.mark.parametrize(
    "path", ["models/model_0", "models/model_0/layers", "calibrations/cal_0", "uploads/upload_0"]
)
def test_unknown_ids_are_not_found(api, path):
    response = api.http.get(f"/v1/{path}")
    assert response.status_code == 404
    assert response.headers["Content-Type"] == "application/problem+json"


def test_what_a_folder_has_beside_its_model_is_named(
    api, settings, model_files, make_safetensors, make_floats
):
    folder: Path = settings.model_folders[0] / "mine"
    folder.mkdir(parents=True)
    extra = {"consolidated.safetensors": make_safetensors({"x": make_floats(2, 2)})}
    for name, data in {**model_files, **extra}.items():
        (folder / name).write_bytes(data)
    response = api.http.post("/v1/models", json={"folder": str(folder)})
    assert response.status_code == 201, response.text
    assert response.json()["source"]["left_out"] == ["consolidated.safetensors"]
    assert response.json()["digest"] == api.http.get(f"/v1/models/{api.model()}").json()["digest"]
