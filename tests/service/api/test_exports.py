"""Exports over HTTP: archives, refusals, and what keeps a plan from being exported."""

import io
import json
from zipfile import ZipFile

import pytest

from quant.catalog import EXPORTERS


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
    assert "A consumer must be one of vllm" in response.json()["detail"]


def test_a_plan_that_fits_nothing_cannot_be_exported(api, finished_job):
    body = {"budgets": ["0.1 bpw"]}
    plan = api.http.post(f"/v1/jobs/{finished_job['id']}/plans", json=body).json()["items"][0]
    response = api.http.get(f"/v1/plans/{plan['id']}/exports/vllm")
    assert response.status_code == 409
    assert "A plan must fit its budget to be exported" in response.json()["detail"]


def test_a_plan_must_exist(api):
    assert api.http.get("/v1/plans/plan_none/exports/vllm").status_code == 404
