from __future__ import annotations

import itertools
import json

import jsonschema
import pytest

from quant.digest import canonical_json, digest
from quant.plan import parse_plan, plan_schema


@pytest.fixture
def plans_path(finished_job):
    return f"/v1/jobs/{finished_job['id']}/plans"


def solve(api, path, **body):
    response = api.http.post(path, json={"budgets": ["4 bpw"]} | body)
    assert response.status_code == 201, response.text
    return response.json()["items"]


def test_a_job_lists_the_plans_of_its_budgets(api, plans_path):
    plans = api.http.get(plans_path).json()["items"]
    assert {plan["budget"]: plan["status"] for plan in plans} == {"4 bpw": "optimal", "0.5 bpw": "infeasible"}


def test_another_budget_is_solved_from_stored_scores(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["3 bpw"])
    assert plan["status"] == "optimal"
    assert plan["gap"] <= 1e-9
    assert plan["resources"]["bits_per_weight"] <= 3
    assert plan["evidence"] is None
    assert plan["source"] == "additive output_kl"
    assert api.http.get(f"/v1/plans/{plan['id']}").json() == plan


def test_a_solved_plan_is_the_best_of_all(api, plans_path, finished_job):
    scores = {}
    for row in api.http.get(f"/v1/jobs/{finished_job['id']}/scores", params={"metric": "output_kl"}).json()[
        "items"
    ]:
        scores.setdefault(row["layer"], {})[row["scheme"]] = row["value"]
    (plan,) = solve(api, plans_path, budgets=["4.5 bpw"])
    sizes = {
        (layer["name"], scheme): (layer["parameters"] * int(scheme[1:]) + 7) // 8 + 2 * layer["matrix"][0]
        for layer in api.context.database and _layers(finished_job, api)
        for scheme in ("w2", "w4", "w8")
    }
    parameters = plan["document"]["totals"]["parameters"]
    best = min(
        sum(scores[layer][scheme] for layer, scheme in zip(scores, choice, strict=True))
        for choice in itertools.product(("w2", "w4", "w8"), repeat=len(scores))
        if 8 * sum(sizes[pair] for pair in zip(scores, choice, strict=True)) <= 4.5 * parameters
    )
    assert plan["objective"] == pytest.approx(best)


def _layers(job, api):
    from service.db.repositories import units

    with api.context.database.read() as session:
        return units.get(session, job["score_set"], "inspect").facts["inventory"]["layers"]


def test_the_same_question_is_the_same_plan(api, plans_path):
    first = solve(api, plans_path, budgets=["3 bpw"])
    assert solve(api, plans_path, budgets=["3 bpw"]) == first
    assert solve(api, plans_path, budgets=["3 bpw"], gap=0.01)[0]["id"] != first[0]["id"]


def test_pins_ties_limits_and_metric_can_differ_from_the_job(api, plans_path):
    (plan,) = solve(
        api,
        plans_path,
        budgets=["6 bpw"],
        pins={"b.*": "w2"},
        ties=[["a.q", "a.k"]],
        limits=["bytes<=10 KiB"],
        metric="weight_error",
    )
    layers = plan["document"]["layers"]
    assert {layers[name]["scheme"] for name in ("b.up", "b.down")} == {"w2"}
    assert layers["a.q"]["scheme"] == layers["a.k"]["scheme"]
    assert plan["metric"] == "weight_error"
    assert plan["document"]["budget"] == "6 bpw,bytes<=10 KiB"


def test_infeasible_is_an_answer_with_the_least_budget(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["bytes<=10"])
    assert (plan["status"], plan["document"]) == ("infeasible", None)
    least = plan["least_budget"]["bytes"]
    (fits,) = solve(api, plans_path, budgets=[f"bytes<={least}"])
    assert (fits["status"], fits["resources"]["bytes"]) == ("optimal", least)
    document = api.http.get(f"/v1/plans/{plan['id']}/document")
    assert (document.status_code, document.json()["least_budget"]) == (404, {"bytes": least})
    assert api.http.post(f"/v1/plans/{plan['id']}/measure").status_code == 409


@pytest.mark.parametrize(
    ("body", "slug"),
    [
        ({"budgets": ["x"]}, "invalid-budget"),
        ({"budgets": []}, "invalid-request"),
        ({"budgets": ["latency<=3 ms"]}, "invalid-budget"),
        ({"pins": {"nowhere": "w4"}}, "unknown-layer"),
        ({"pins": {"a.q": "w9"}}, "unknown-scheme"),
        ({"ties": [["a.q", "zz"]]}, "unknown-layer"),
        ({"metric": "beauty"}, "unknown-metric"),
        ({"time_limit_seconds": 0}, "invalid-request"),
        ({"gap": 2}, "invalid-request"),
        ({"schemes": ["w4"]}, "invalid-request"),
    ],
)
def test_a_bad_question_is_refused(api, plans_path, body, slug):
    response = api.http.post(plans_path, json={"budgets": ["4 bpw"]} | body)
    assert (response.status_code, response.json()["type"]) == (422, f"urn:bitplan:problem:{slug}")


@pytest.mark.parametrize("body", [{"metric": "fisher"}, {"pins": {"a.q": "w6"}}])
def test_what_was_not_measured_cannot_be_planned(api, plans_path, body):
    response = api.http.post(plans_path, json={"budgets": ["4 bpw"]} | body)
    assert (response.status_code, response.json()["type"]) == (409, "urn:bitplan:problem:scores-missing")
    assert "a.q x" in response.json()["detail"]


def test_a_job_without_all_scores_is_not_planned(api, runner):
    job = api.submit()
    path = f"/v1/jobs/{job['id']}/plans"
    assert api.http.post(path, json={"budgets": ["4 bpw"]}).status_code == 409
    runner.score(runner.start(job["id"]), leave_out=1)
    response = api.http.post(path, json={"budgets": ["4 bpw"]})
    assert (response.status_code, response.headers["Retry-After"]) == (409, "2")
    assert "b.down x w8 (1 in all)" in response.json()["detail"]


def test_the_document_is_canonical_and_valid(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["3 bpw"])
    response = api.http.get(f"/v1/plans/{plan['id']}/document")
    assert response.headers["ETag"] == f'"{plan["digest"]}"'
    assert response.headers["Content-Disposition"] == f'attachment; filename="bitplan-{plan["id"]}.json"'
    assert response.text == canonical_json(plan["document"])
    assert digest(json.loads(response.text)) == plan["digest"]
    jsonschema.validate(response.json(), plan_schema())
    parsed = parse_plan(response.content)
    assert parsed.digest == plan["digest"]
    assert parsed.digests.scores is not None


def test_the_document_is_sent_once(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["3 bpw"])
    path = f"/v1/plans/{plan['id']}/document"
    assert api.http.get(path, headers={"If-None-Match": f'"{plan["digest"]}"'}).status_code == 304


def test_the_same_inputs_give_the_same_bytes_in_another_job(api, runner, plans_path, finished_job):
    again = api.submit(budgets=["4 bpw", "0.5 bpw"], metrics=["output_kl", "weight_error"])
    runner.run(again["id"])
    digests = [
        {plan["budget"]: plan["digest"] for plan in api.http.get(f"/v1/jobs/{job}/plans").json()["items"]}
        for job in (finished_job["id"], again["id"])
    ]
    assert digests[0] == digests[1]


def test_measuring_queues_one_job(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["3 bpw"])
    first = api.http.post(f"/v1/plans/{plan['id']}/measure")
    assert (first.status_code, first.json()["kind"]) == (202, "measure_plan")
    assert first.json()["request"] == {"plan": plan["id"], "job": plan["job"]}
    assert api.http.post(f"/v1/plans/{plan['id']}/measure").json()["id"] == first.json()["id"]


def test_plans_and_scores_are_asked_of_searches(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["3 bpw"])
    job = api.http.post(f"/v1/plans/{plan['id']}/measure").json()
    assert api.http.get(f"/v1/jobs/{job['id']}/scores").json()["type"].endswith("not-a-search")


def test_unknown_plans_are_not_found(api):
    for path in ("plan_0", "plan_0/document"):
        assert api.http.get(f"/v1/plans/{path}").json()["type"].endswith("plan-not-found")


def test_plans_come_in_pages(api, plans_path):
    solve(api, plans_path, budgets=["3 bpw", "5 bpw", "6 bpw"])
    everything = api.http.get(plans_path).json()["items"]
    first = api.http.get(plans_path, params={"limit": 3}).json()
    rest = api.http.get(plans_path, params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [p["id"] for p in first["items"] + rest["items"]] == [p["id"] for p in everything]
    assert len(everything) == 5


def test_scores_come_in_pages_and_by_metric(api, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/scores"
    everything = api.http.get(path).json()
    assert (len(everything["items"]), everything["next_cursor"]) == (4 * 3 * 2, None)
    first = api.http.get(path, params={"limit": 10, "metric": "output_kl"}).json()
    rest = api.http.get(
        path, params={"limit": 10, "metric": "output_kl", "cursor": first["next_cursor"]}
    ).json()
    rows = first["items"] + rest["items"]
    assert rows == [row for row in everything["items"] if row["metric"] == "output_kl"]
    assert set(rows[0]) == {"layer", "scheme", "metric", "value", "stderr", "samples"}
    assert api.http.get(path, params={"metric": "fisher"}).status_code == 422


def test_scores_come_as_csv(api, finished_job):
    response = api.http.get(f"/v1/jobs/{finished_job['id']}/scores", params={"format": "csv"})
    assert response.headers["Content-Type"].startswith("text/csv")
    lines = response.text.splitlines()
    assert lines[0] == "layer,scheme,metric,value,stderr,samples"
    assert len(lines) == 1 + 4 * 3 * 2
    first = api.http.get(f"/v1/jobs/{finished_job['id']}/scores").json()["items"][0]
    assert float(lines[1].split(",")[3]) == first["value"]


def test_a_job_without_scores_says_so(api):
    job = api.submit()
    response = api.http.get(f"/v1/jobs/{job['id']}/scores")
    assert (response.status_code, response.json()["type"]) == (409, "urn:bitplan:problem:scores-missing")


def test_the_frontier_falls_as_bytes_rise(api, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/frontier"
    body = api.http.get(path).json()
    used = [point["resources"]["bytes"] for point in body["items"]]
    losses = [point["objective"] for point in body["items"]]
    assert (body["resource"], body["metric"]) == ("bytes", "output_kl")
    assert used == sorted(set(used))
    assert losses == sorted(losses, reverse=True)
    assert len(used) > 4
    assert body["items"][0]["layers"] is None
    named = api.http.get(path, params={"layers": True, "points": 2}).json()["items"]
    assert set(named[0]["layers"].values()) == {"w2"}
    assert set(named[-1]["layers"].values()) == {"w8"}


@pytest.mark.parametrize("params", [{"resource": "joy"}, {"points": 1}, {"metric": "beauty"}])
def test_a_frontier_over_nothing_is_refused(api, finished_job, params):
    assert api.http.get(f"/v1/jobs/{finished_job['id']}/frontier", params=params).status_code == 422


def test_a_plan_says_what_it_was_asked(api, plans_path):
    from service.wire import JobRequest

    (plan,) = solve(api, plans_path, budgets=["5 bpw"], pins={"b.up": "w2"}, metric="weight_error")
    job = api.http.get(f"/v1/jobs/{plan['job']}").json()
    merged = JobRequest.model_validate({**job["request"], **plan["ask"]})
    assert (merged.budgets, merged.pins, merged.metrics) == (["5 bpw"], {"b.up": "w2"}, ["weight_error"])


def test_a_pinned_layer_takes_part():
    from service.wire import JobRequest

    request = JobRequest(
        model="m", calibration="c", budgets=["4 bpw"], include=["*.emb"], pins={"lm_head": "w8", "a.*": "w4"}
    )
    assert request.takes_part == ("*.emb", "lm_head")
