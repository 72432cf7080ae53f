"""Latency, energy and memory through the API: where numbers come from, and what is refused."""

from __future__ import annotations

import pytest

from quant.devices import DEVICES
from quant.plan import parse_plan

MINE = DEVICES["rtx4090"].as_json() | {"name": "mine"}


def test_the_catalog_lists_every_device_with_its_error_bar(api):
    items = api.http.get("/v1/devices").json()["items"]
    assert [item["name"] for item in items] == list(DEVICES)
    assert all(item["relative_error"] > 0 for item in items)


@pytest.mark.parametrize(
    ("members", "slug", "pointer"),
    [
        ({"latency": "roofline:tpu"}, "invalid-latency", "/latency"),
        ({"latency": {"a.q": {"w9": 1}}}, "invalid-latency", "/latency"),
        ({"latency": "measured", "device": "cuda"}, "invalid-latency", "/latency"),
        ({"energy": "device:tpu"}, "invalid-costs", "/energy"),
        ({"device_profile": {"name": "x"}}, "invalid-device", "/device_profile"),
    ],
)
def test_a_cost_that_cannot_be_had_is_refused_with_the_place(api, members, slug, pointer):
    problem = api.http.post("/v1/jobs", json=api.request(**members)).json()
    assert (problem["status"], problem["type"]) == (422, f"urn:bitplan:problem:{slug}")
    assert (
        problem["errors"][0]["pointer"] == pointer if "errors" in problem else problem["pointer"] == pointer
    )


def test_latency_comes_from_one_place(api):
    body = api.request(latency="roofline:h100", latency_ns={"a.q": {"w4": 1}})
    assert api.http.post("/v1/jobs", json=body).status_code == 422


def test_a_resolve_says_which_latency_it_used(api, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/plans"
    body = {
        "budgets": ["latency<=1 ms"],
        "latency": "roofline:mine",
        "device_profile": MINE,
        "energy": "device:h100",
    }
    (plan,) = api.http.post(path, json=body).json()["items"]
    assert plan["status"] == "optimal"
    assert plan["cost_sources"]["latency"] == {"source": "roofline:mine", "relative_error": 1.0}
    assert plan["cost_sources"]["energy"] == {"source": "device:h100"}
    assert plan["document"]["latency"] == plan["ask"]["latency"] == "roofline:mine"
    assert plan["resources"]["latency_ns"] >= 4 * MINE["launch_ns"]
    assert plan["resources"]["energy_pj"] > 0
    assert parse_plan(api.http.get(f"/v1/plans/{plan['id']}/document").text).latency == "roofline:mine"
    (other,) = api.http.post(path, json=body | {"latency": "roofline:h100"}).json()["items"]
    assert other["id"] != plan["id"]


def test_a_latency_that_no_job_measured_is_a_conflict(api, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/plans"
    response = api.http.post(path, json={"budgets": ["latency<=1 ms"], "latency": "measured"})
    assert (response.status_code, response.json()["type"]) == (409, "urn:bitplan:problem:latency-missing")


def test_a_deployment_of_a_model_without_attention_is_refused(api, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/plans"
    response = api.http.post(path, json={"budgets": ["memory_bytes<=1 MiB"], "deployment": {}})
    assert (response.status_code, response.json()["type"]) == (422, "urn:bitplan:problem:invalid-costs")
    assert "attention layers" in response.json()["detail"]
