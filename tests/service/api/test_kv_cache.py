"""Caches as decisions over HTTP: what a job may ask for, and re-solves that trade them against weights."""

from __future__ import annotations

from itertools import product

import pytest

from quant.geometry import Geometry
from quant.schemes import parse_scheme

ATTENTION = ("a", "b")
GEOMETRY = Geometry(cached=16, windows=(None, None), vectors=2, attention=ATTENTION)
PER_TOKEN = {"full": 32, "int8": 16 + 4, "int4": 8 + 4}
SERVED = {"context_length": 50, "batch": 2}


@pytest.fixture
def attention(runner):
    runner.geometry = {"geometry": GEOMETRY.as_json()}
    return runner


@pytest.fixture
def plans_path(api, attention):
    job = api.submit(kv_cache=["int8", "int4"], deployment=SERVED)
    attention.run(job["id"])
    return f"/v1/jobs/{job['id']}/plans"


def solve(api, path, budget, **body):
    response = api.http.post(path, json={"budgets": [budget]} | body)
    assert response.status_code == 201, response.text
    return response.json()["items"][0]


def cheapest(scores, layers, memory, other, tokens=100):
    """The least loss of every plan there is."""
    names = [layer["name"] for layer in layers]
    stored = {
        (layer["name"], scheme): parse_scheme(scheme).storage(tuple(layer["matrix"])).bytes
        for layer in layers
        for scheme in ("w2", "w4", "w8")
    }
    return min(
        sum(scores[pair] for pair in zip(names, weights, strict=True))
        + sum(scores[name, f"kv-{kind}"] for name, kind in zip(ATTENTION, kinds, strict=True))
        for weights in product(("w2", "w4", "w8"), repeat=len(names))
        for kinds in product(PER_TOKEN, repeat=2)
        if other
        + sum(stored[pair] for pair in zip(names, weights, strict=True))
        + sum(tokens * PER_TOKEN[kind] for kind in kinds)
        <= memory
    )


def test_a_resolve_trades_weights_against_caches(api, plans_path):
    rows = api.http.get(plans_path.replace("plans", "scores")).json()["items"]
    scores = {(row["layer"], row["scheme"]): row["value"] for row in rows}
    assert {scheme for layer, scheme in scores if layer == "b"} == {"kv-full", "kv-int8", "kv-int4"}
    for memory in (4000, 5000, 6500, 7500):
        plan = solve(api, plans_path, f"memory_bytes<={memory}")
        document = plan["document"]
        layers = [{"name": name, "matrix": layer["matrix"]} for name, layer in document["layers"].items()]
        assert plan["objective"] == pytest.approx(cheapest(scores, layers, memory, 256))
        kept = [100 * PER_TOKEN[kind] for kind in document["kv_cache"].values()]
        assert plan["resources"]["kv_cache_bytes"] == sum(kept)
        assert plan["resources"]["memory_bytes"] <= memory


def test_a_resolve_may_serve_otherwise_and_pin_caches(api, plans_path):
    longer = {"context_length": 100, "batch": 2}
    plan = solve(api, plans_path, "bytes<=1 MiB", deployment=longer, pins={"a": "kv-int4"})
    assert plan["document"]["kv_cache"] == {"a": "int4", "b": "full"}
    assert plan["resources"]["kv_cache_bytes"] == 200 * (PER_TOKEN["int4"] + PER_TOKEN["full"])
    one = solve(api, plans_path, "kv_cache_bytes<=4500", runtime="openvino", pins={"*.*": "w8"})
    assert one["document"]["kv_cache"] == {"a": "int8", "b": "int8"}
    explained = api.http.get(one["links"]["explanation"], params={"draws": 0}).json()
    assert explained["decisions"][-1]["layers"] == ["a", "b"]
    assert explained["decisions"][-1]["down"] is None
    up = explained["decisions"][-1]["up"]
    assert up["scheme"] == "kv-full"
    assert up["resources"]["kv_cache_bytes"] == 200 * (PER_TOKEN["full"] - PER_TOKEN["int8"])
    points = api.http.get(
        plans_path.replace("plans", "frontier"), params={"resource": "kv_cache_bytes", "layers": True}
    ).json()["items"]
    assert [point["resources"]["kv_cache_bytes"] for point in points][-1] == 2 * 100 * PER_TOKEN["full"]
    assert points[0]["layers"]["a"] == "kv-int4"


BAD = [
    ({"kv_cache": ["int3"]}, "unknown-cache-type", "/kv_cache/0"),
    ({"pins": {"a": "kv-int8"}}, "missing-cache-types", ""),
    ({"kv_cache": ["int8"], "pins": {"a.q": "kv-int8"}}, "unknown-layer", "/pins/a.q"),
    ({"kv_cache": ["int8"], "pins": {"a": "w4"}}, "unknown-layer", "/pins/a"),
    ({"kv_cache": ["int8"], "runtime": "onnxruntime"}, "runtime-refuses", "/runtime"),
    ({"kv_cache": ["int8"], "metrics": ["fisher"]}, "metric-not-offered", ""),
]


def test_what_cannot_be_is_refused_before_the_job(api, attention):
    body = api.request()
    attention.verify(body["model"])
    for members, slug, pointer in BAD:
        response = api.http.post("/v1/jobs", json=body | members)
        problem = response.json()
        assert (response.status_code, problem["type"]) == (422, f"urn:bitplan:problem:{slug}"), members
        assert problem.get("pointer", "").startswith(pointer)


def test_a_verified_model_without_a_cache_is_refused(api, runner):
    runner.geometry = {"geometry": None}
    body = api.request(kv_cache=["int8"])
    runner.verify(body["model"])
    problem = api.http.post("/v1/jobs", json=body).json()
    assert (problem["type"], problem["pointer"]) == ("urn:bitplan:problem:no-kv-cache", "/kv_cache")


def test_a_model_that_is_not_verified_yet_is_left_to_the_worker(api, attention):
    body = api.request(kv_cache=["fp8"], pins={"b": "kv-fp8"}, runtime="openvino", schemes=["w4"])
    response = api.http.post("/v1/jobs", json=body)
    assert response.status_code == 202
    assert response.json()["request"]["kv_cache"] == ["fp8_e4m3"]
    assert response.json()["request"]["pins"] == {"b": "kv-fp8_e4m3"}
