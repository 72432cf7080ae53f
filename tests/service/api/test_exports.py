"""Exports over HTTP: archives, refusals, and what keeps a plan from being exported."""

import io
import json
import struct
from zipfile import ZipFile

import pytest

from quant.catalog import CHECKPOINTS, EXPORTERS


@pytest.fixture
def plan(api, runner, finished_job):
    """A plan of the finished job, whose model was verified."""
    runner.verify(finished_job["request"]["model"])
    body = {"budgets": ["4 bpw"]}
    return api.http.post(f"/v1/jobs/{finished_job['id']}/plans", json=body).json()["items"][0]


def test_the_archive_holds_the_plan_for_every_module(api, plan):
    response = api.http.get(f"/v1/plans/{plan['id']}/exports/vllm")
    assert response.status_code == 200
    assert response.headers["content-disposition"] == 'attachment; filename="bitplan-vllm.zip"'
    with ZipFile(io.BytesIO(response.content)) as files:
        assert files.namelist() == ["bitplan_provenance.json", "config.json"]
        config, provenance = (
            json.loads(files.read(name)) for name in ("config.json", "bitplan_provenance.json")
        )
    groups = config["quantization_config"]["config_groups"].values()
    found = {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}
    assert found == {name: layer["weight_bits"] for name, layer in plan["document"]["layers"].items()}
    assert config["quantization_config"]["ignore"] == ["lm_head", "tied_head"]
    assert config["model_type"] == "llama"
    assert provenance["plan"] == plan["digest"]


def test_the_archive_is_sent_once(api, plan):
    path = f"/v1/plans/{plan['id']}/exports/vllm"
    first = api.http.get(path)
    again = api.http.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_refusal_lists_every_violation(api, plan):
    response = api.http.get(f"/v1/plans/{plan['id']}/exports/mlx")
    problem = response.json()
    assert (response.status_code, problem["type"].rpartition("/")[2].rpartition(":")[2]) == (
        422,
        "export-refused",
    )
    assert {item["layer"] for item in problem["violations"]} == set(plan["document"]["layers"])
    assert all(item["rule"] and item["got"] for item in problem["violations"])


def test_consumers_are_listed_and_others_unknown(api, plan):
    assert [item["name"] for item in api.http.get("/v1/exports").json()["items"]] == list(EXPORTERS)
    response = api.http.get(f"/v1/plans/{plan['id']}/exports/nobody")
    assert response.status_code == 404
    assert "Consumer must be one of vllm" in response.json()["detail"]


@pytest.mark.parametrize("consumer", [name for name in CHECKPOINTS if name not in EXPORTERS])
def test_consumers_of_weights_are_sent_to_their_own_endpoint(consumer, api, plan):
    response = api.http.get(f"/v1/plans/{plan['id']}/exports/{consumer}")
    assert response.status_code == 404
    assert "It takes weights. Run " in response.json()["detail"]
    assert response.json()["detail"].endswith("or POST /v1/plans/{id}/checkpoint.")


def test_a_plan_that_fits_nothing_cannot_be_exported(api, finished_job):
    body = {"budgets": ["0.1 bpw"]}
    plan = api.http.post(f"/v1/jobs/{finished_job['id']}/plans", json=body).json()["items"][0]
    response = api.http.get(f"/v1/plans/{plan['id']}/exports/vllm")
    assert response.status_code == 409
    assert "A plan must fit its budget to be exported" in response.json()["detail"]


def test_a_plan_must_exist(api):
    assert api.http.get("/v1/plans/plan_none/exports/vllm").status_code == 404


@pytest.fixture
def fine_tune(api, runner, model_files):
    """The id of a verified model of the same shapes with another weight in it."""
    weights = model_files["model.safetensors"]
    files = {**model_files, "model.safetensors": weights[:-4] + struct.pack("<f", 0.125)}
    model = str(api.complete(files).json()["id"])
    runner.verify(model)
    return model


def test_a_plan_for_a_fine_tune_must_be_forced_and_says_so(api, plan, fine_tune):
    path = f"/v1/plans/{plan['id']}/exports/vllm?model={fine_tune}"
    problem = api.http.get(path).json()
    assert (problem["status"], problem["type"], problem["pointer"]) == (
        409,
        "urn:bitplan:problem:other-model",
        "/force",
    )
    assert "Plan must be made for this model" in problem["detail"]
    response = api.http.get(f"{path}&force=true")
    assert response.status_code == 200
    with ZipFile(io.BytesIO(response.content)) as files:
        told = json.loads(files.read("bitplan_provenance.json"))
    assert told["forced"] is True
    assert told["model"] == api.http.get(f"/v1/models/{fine_tune}").json()["digest"] != told["planned_for"]
    assert told["mismatches"] == [problem["detail"].removesuffix(FORCE_IT)]


FORCE_IT = " Pass the plan's own model, or force it for a fine-tune of the same shapes."


def test_another_model_must_be_verified_and_known(api, plan, model_files):
    files = {**model_files, "model.safetensors": model_files["model.safetensors"][:-4] + b"\0" * 4}
    model = str(api.complete(files).json()["id"])
    path = f"/v1/plans/{plan['id']}/exports/vllm"
    assert "must be verified" in api.http.get(f"{path}?model={model}&force=true").json()["detail"]
    assert api.http.get(f"{path}?model=model_none").status_code == 404
