"""Runtimes through the API: the catalog, jobs and re-solves that keep their rules."""

from __future__ import annotations

import pytest

from quant.runtimes import RUNTIMES


def test_the_catalog_lists_every_runtime(api):
    items = api.http.get("/v1/runtimes").json()["items"]
    assert [item["name"] for item in items] == list(RUNTIMES)
    assert ["q_proj", "k_proj", "v_proj"] in items[0]["fused"]


def test_an_unknown_runtime_is_refused(api):
    response = api.http.post("/v1/jobs", json=api.request(runtime="tensorflow"))
    assert response.status_code == 422
    assert "vllm" in response.text


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"runtime": "vllm"}, "a.q"),
        ({"runtime": "llama.cpp"}, "q4_k*"),
        ({"runtime": "openvino", "schemes": ["w2"]}, "not w2"),
        ({"runtime": "openvino", "pins": {"a.q": "w2"}}, "pin must hold a scheme"),
    ],
)
def test_a_runtime_that_can_run_nothing_is_refused_before_the_job(api, runner, members, words):
    body = api.request(**members)
    runner.verify(body["model"])
    response = api.http.post("/v1/jobs", json=body)
    problem = response.json()
    assert (response.status_code, problem["type"]) == (422, "urn:bitplan:problem:runtime-refuses")
    assert words in problem["detail"]


def test_layers_that_are_excluded_need_no_choice(api, runner):
    body = api.request(runtime="openvino", schemes=["w4", "w8"], exclude=["a.*"])
    runner.verify(body["model"])
    assert api.http.post("/v1/jobs", json=body).status_code == 202


def test_a_resolve_keeps_the_rules_of_a_runtime(api, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/plans"
    body = {"budgets": ["6 bpw"], "runtime": "openvino"}
    (plan,) = api.http.post(path, json=body).json()["items"]
    assert plan["document"]["runtime"] == plan["ask"]["runtime"] == "openvino"
    assert {layer["scheme"] for layer in plan["document"]["layers"].values()} <= {"w4", "w8"}
    (small,) = api.http.post(path, json=body | {"budgets": ["3 bpw"]}).json()["items"]
    assert small["status"] == "infeasible"
    (free,) = api.http.post(path, json={"budgets": ["3 bpw"]}).json()["items"]
    assert free["status"] == "optimal"
    assert "runtime" not in free["document"]
    refused = api.http.post(path, json=body | {"runtime": "vllm"})
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:bitplan:problem:runtime-refuses")
