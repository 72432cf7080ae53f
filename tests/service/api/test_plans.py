from __future__ import annotations

import io
import itertools
import json

import jsonschema
import pytest
from sqlalchemy import event

from quant.digest import canonical_json, digest
from quant.plan import parse_plan, plan_schema
from sensitivity.units import InspectUnit
from service.api import scores


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
    losses = {}
    for row in api.http.get(f"/v1/jobs/{finished_job['id']}/scores", params={"metric": "output_kl"}).json()[
        "items"
    ]:
        losses.setdefault(row["layer"], {})[row["scheme"]] = row["value"]
    (plan,) = solve(api, plans_path, budgets=["4.5 bpw"])
    sizes = {
        (layer["name"], scheme): (layer["parameters"] * int(scheme[1:]) + 7) // 8 + 2 * layer["matrix"][0]
        for layer in api.context.database and _layers(finished_job, api)
        for scheme in ("w2", "w4", "w8")
    }
    parameters = plan["document"]["totals"]["parameters"]
    best = min(
        sum(losses[layer][scheme] for layer, scheme in zip(losses, choice, strict=True))
        for choice in itertools.product(("w2", "w4", "w8"), repeat=len(losses))
        if 8 * sum(sizes[pair] for pair in zip(losses, choice, strict=True)) <= 4.5 * parameters
    )
    assert plan["objective"] == pytest.approx(best)


def test_decoupled_scores_are_made_from_the_stored_ones(api, runner):
    """Layers of two roles, each on the scale of its own metric; protected ones at the largest scheme."""
    metrics = ["metric_decoupled", "output_kl", "sqnr"]
    job = api.submit(metrics=metrics, role_metrics={"a.*": "output_kl", "*": "sqnr", "a.q": "output_kl"})
    runner.run(job["id"])
    path = f"/v1/jobs/{job['id']}/plans"
    (plan,) = solve(api, path, budgets=["6 bpw"], metric="metric_decoupled", protect=["b.up"])
    document = plan["document"]
    assert document["decided_by"]["a.q"] == "output_kl"
    assert set(document["decided_by"].values()) == {"output_kl", "sqnr"}
    assert document["layers"]["b.up"]["scheme"] == "w8"
    jsonschema.validate(document, plan_schema())
    rows = api.http.get(f"/v1/jobs/{job['id']}/scores").json()["items"]
    deciding = document["decided_by"]
    costs = {}
    for row in rows:
        if deciding[row["layer"]] == row["metric"]:
            sign = -1 if row["metric"] == "sqnr" else 1
            costs.setdefault(row["layer"], {})[row["scheme"]] = sign * row["value"]
    spans = dict.fromkeys(deciding.values(), 0.0)
    for layer, values in costs.items():
        spans[deciding[layer]] += max(values.values()) - min(values.values())
    expected = sum(
        (costs[name][layer["scheme"]] - min(costs[name].values())) / spans[deciding[name]]
        for name, layer in document["layers"].items()
    )
    assert plan["objective"] == pytest.approx(expected)
    assert "decided_by" not in solve(api, path, metric="output_kl")[0]["document"]


def test_plans_are_solved_for_other_objectives(api, runner):
    """Each re-solve says what it is about; the job's own objective holds unless it is replaced."""
    job = api.submit(metrics=["output_kl", "sqnr"], objective="minimax")
    runner.run(job["id"])
    path = f"/v1/jobs/{job['id']}/plans"
    (plan,) = solve(api, path, budgets=["5 bpw"])
    assert plan["document"]["objective"] == plan["source"] == plan["ask"]["objective"] == "minimax"
    jsonschema.validate(plan["document"], plan_schema())
    assert parse_plan(json.dumps(plan["document"])).objective == "minimax"
    rows = api.http.get(f"/v1/jobs/{job['id']}/scores", params={"metric": "output_kl"}).json()["items"]
    scores = {(row["layer"], row["scheme"]): row["value"] for row in rows}
    chosen = {layer: entry["scheme"] for layer, entry in plan["document"]["layers"].items()}
    assert plan["objective"] == max(scores[pair] for pair in chosen.items())
    assert plan["parts"] == [
        {
            "name": "largest cost of a group",
            "value": plan["objective"],
            "bound": plan["bound"],
            "gap": plan["gap"],
        }
    ]
    (summed,) = solve(api, path, budgets=["5 bpw"], objective="sum")
    assert "objective" not in summed["document"]
    assert summed["id"] != plan["id"]
    (staged,) = solve(api, path, budgets=["5 bpw"], objective="lexicographic:output_kl within 5%,sqnr")
    assert staged["ask"]["objective"] == "lexicographic: output_kl within 5%, sqnr"
    assert [part["name"] for part in staged["parts"]] == ["output_kl", "sqnr"]
    assert staged["parts"][0]["value"] <= summed["objective"]


def test_choices_are_forbidden_in_a_resolve(api, plans_path, finished_job):
    (free,) = solve(api, plans_path, budgets=["6 bpw"])
    (plan,) = solve(api, plans_path, budgets=["6 bpw"], forbid={"b.*": ["w4", "w8"], "a.q": ["w2", "w4"]})
    layers = {name: layer["scheme"] for name, layer in plan["document"]["layers"].items()}
    assert layers["a.q"] == "w8"
    assert layers["b.up"] == layers["b.down"] == "w2"
    assert plan["objective"] > free["objective"]
    assert plan["ask"]["forbid"] == {"b.*": ["w4", "w8"], "a.q": ["w2", "w4"]}
    told = api.http.get(plan["links"]["explanation"], params={"draws": 0}).json()["restrictions"]
    assert [(one["kind"], one["name"]) for one in told] == [
        ("forbid", "b.*=w4,w8"),
        ("forbid", "a.q=w2,w4"),
        ("all", "all together"),
    ]
    assert told[-1]["objective_without"] == pytest.approx(free["objective"])


@pytest.mark.parametrize(
    ("forbid", "slug", "words"),
    [
        ({"zzz": ["w2"]}, "unknown-layer", "zzz"),
        ({"a.q": ["w3"]}, "invalid-request", "must be one of the menu: w2, w4, w8. Got 'w3'"),
        ({"a.q": ["kv-int8"]}, "unknown-layer", "that decides caches"),
        ({"a.q": []}, "invalid-request", "at least 1 item"),
        ({"a.q": ["w2", "w2"]}, "repeated-value", "Got 'w2' twice"),
        ({"a.q": ["many"]}, "unknown-scheme", "many"),
    ],
)
def test_what_cannot_be_forbidden_is_refused(api, plans_path, forbid, slug, words):
    response = api.http.post(plans_path, json={"budgets": ["4 bpw"], "forbid": forbid})
    problem = response.json()
    assert (response.status_code, problem["type"]) == (422, f"urn:bitplan:problem:{slug}"), problem
    assert words in problem["detail"]


def test_a_jobs_own_forbids_hold_until_they_are_replaced(api, runner):
    job = api.submit(forbid={"b.down": ["w8"]})
    runner.run(job["id"])
    path = f"/v1/jobs/{job['id']}/plans"
    (own,), (other,) = solve(api, path, budgets=["8 bpw"]), solve(api, path, budgets=["8 bpw"], forbid={})
    layers = [plan["document"]["layers"]["b.down"]["scheme"] for plan in (own, other)]
    assert layers == ["w4", "w8"]
    points = api.http.get(f"/v1/jobs/{job['id']}/frontier", params={"layers": True}).json()["items"]
    assert "w8" not in {point["layers"]["b.down"] for point in points}


def test_limits_may_be_on_stored_metrics(api, runner):
    job = api.submit(metrics=["output_kl", "sqnr"])
    runner.run(job["id"])
    path = f"/v1/jobs/{job['id']}/plans"
    (free,) = solve(api, path, budgets=["8 bpw"], metric="sqnr")
    (plan,) = solve(api, path, budgets=["8 bpw,output_kl<=1e-9"], metric="sqnr")
    assert free["status"] == "optimal"
    assert plan["status"] == "infeasible"
    least = plan["least_budget"]["output_kl"]
    (fitting,) = solve(api, path, budgets=[f"8 bpw,output_kl<={least * (1 + 1e-12)!r}"], metric="sqnr")
    assert fitting["status"] == "optimal"


def test_objectives_are_listed_and_bad_ones_refused(api, plans_path):
    listed = api.http.get("/v1/objectives").json()
    assert listed["default"] == "sum"
    assert {"minimax", "worst", "threshold"} <= {item["name"] for item in listed["items"]}
    for text, words in (
        ("best", "must be one of sum, minimax"),
        (
            "worst: output_kl, loss_delta",
            "must name metrics of the search: output_kl, weight_error. Got 'loss_delta'",
        ),
        ("weighted: a=1", "must name metrics of the search"),
    ):
        response = api.http.post(plans_path, json={"budgets": ["4 bpw"], "objective": text})
        problem = response.json()
        assert (response.status_code, problem["type"]) == (422, "urn:bitplan:problem:invalid-objective")
        assert words in problem["detail"]
        assert problem["pointer"] == "/objective"


def _layers(job, api):
    from service.db.repositories import units

    with api.context.database.read() as session:
        return units.get(session, job["score_set"], InspectUnit().key).facts["inventory"]["layers"]


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
    assert set(plan["shadow_prices"]) == {"bits_per_weight", "bytes"}
    assert plan["shadow_prices"]["bits_per_weight"] == 0 <= plan["shadow_prices"]["bytes"]


def test_infeasible_is_an_answer_with_the_least_budget(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["bytes<=10"])
    assert (plan["status"], plan["document"]) == ("infeasible", None)
    least = plan["least_budget"]["bytes"]
    (member,) = plan["conflict"]["members"]
    assert (member["kind"], member["name"], member["limit"], member["least"]) == ("limit", "bytes", 10, least)
    (fits,) = solve(api, plans_path, budgets=[f"bytes<={least}"])
    assert (fits["conflict"], fits["objective"]) == (None, pytest.approx(member["objective"]))
    assert fits["reference"]["plan"] == pytest.approx(fits["objective"])
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


def test_scores_are_compared_page_by_page_in_a_few_statements(api, finished_job, monkeypatch):
    monkeypatch.setattr(scores, "LARGEST_PAGE", 5)
    path, statements = f"/v1/jobs/{finished_job['id']}/scores", []
    event.listen(
        api.context.database.engine, "before_cursor_execute", lambda *given: statements.append(given[2])
    )
    rows = api.http.get(path, params={"against": "w4"}).json()["items"]
    assert sum(statement.startswith("SELECT") for statement in statements) < 8
    values = {(row["layer"], row["scheme"], row["metric"]): row["value"] for row in rows}
    assert len(values) == len(rows) == 4 * 3 * 2
    for row in rows:
        assert row["difference"] == row["value"] - values[row["layer"], "w4", row["metric"]]
    lines = api.http.get(path, params={"against": "w4", "format": "csv"}).text.splitlines()
    assert [line.split(",")[6] for line in lines[1:]] == [repr(row["difference"]) for row in rows]


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
    known = {"layer", "scheme", "metric", "value", "stderr", "samples", "difference", "difference_stderr"}
    assert set(rows[0]) == known
    assert api.http.get(path, params={"metric": "fisher"}).status_code == 422


def test_scores_come_as_csv(api, finished_job):
    response = api.http.get(f"/v1/jobs/{finished_job['id']}/scores", params={"format": "csv"})
    assert response.headers["Content-Type"].startswith("text/csv")
    lines = response.text.splitlines()
    assert lines[0] == "layer,scheme,metric,value,stderr,samples"
    assert len(lines) == 1 + 4 * 3 * 2
    first = api.http.get(f"/v1/jobs/{finished_job['id']}/scores").json()["items"][0]
    assert float(lines[1].split(",")[3]) == first["value"]


@pytest.mark.parametrize("against", [None, "w4"])
def test_scores_come_as_parquet(api, finished_job, monkeypatch, against):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the parquet extra is not installed")
    monkeypatch.setattr("service.api.score_parquet.GROUP_ROWS", 10)
    path, query = f"/v1/jobs/{finished_job['id']}/scores", {} if against is None else {"against": against}
    response = api.http.get(path, params={"format": "parquet", **query})
    assert response.headers["Content-Type"] == "application/vnd.apache.parquet"
    assert response.headers["Content-Disposition"].endswith('-scores.parquet"')
    file = parquet.ParquetFile(io.BytesIO(response.content))
    assert file.num_row_groups == 3
    items = api.http.get(path, params=query).json()["items"]
    rows = file.read().to_pylist()
    assert rows == [{name: item[name] for name in rows[0]} for item in items]
    assert ("difference" in rows[0]) == (against is not None)


def test_without_the_library_parquet_says_what_to_do(api, finished_job, monkeypatch):
    monkeypatch.setattr("service.ingest.parquet_text.find_spec", lambda name: None)
    response = api.http.get(f"/v1/jobs/{finished_job['id']}/scores", params={"format": "parquet"})
    assert response.status_code == 422
    assert response.json()["type"].endswith("parquet-not-installed")
    assert "bitplan[parquet]" in response.json()["detail"]


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


def test_a_plan_is_explained_from_stored_scores(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["4.5 bpw"], pins={"b.up": "w4"}, ties=[["a.q", "a.k"]])
    path = plan["links"]["explanation"]
    response = api.http.get(path, params={"draws": 50})
    body = response.json()
    assert (body["plan"], body["status"], body["metric"]) == (plan["id"], "optimal", "output_kl")
    assert body["objective"] == body["optimum"] == pytest.approx(plan["objective"])
    assert body["shadow_prices"] == plan["shadow_prices"]
    assert [one["layers"] for one in body["decisions"]] == [["a.q", "a.k"], ["b.up"], ["b.down"]]
    tied, pinned, free = body["decisions"]
    assert (pinned["scheme"], pinned["margin"], pinned["up"]) == ("w4", None, None)
    assert free["up"]["resources"]["bytes"] > 0 > free["up"]["loss"]
    assert free["down"] is None or free["down"]["resources"]["bytes"] < 0 < free["down"]["loss"]
    assert 0 <= tied["stability"] <= 1
    assert body["stability"]["draws"] == 50
    names = [one["name"] for one in body["restrictions"]]
    assert names == ["b.up=w4", "a.q+a.k", "all together"]
    unpinned = solve(api, plans_path, budgets=["4.5 bpw"], ties=[["a.q", "a.k"]])[0]
    assert body["restrictions"][0]["objective_without"] == pytest.approx(unpinned["objective"])
    assert set(body["reference"]["bits"]) == {"a.q", "a.k", "b.up", "b.down"}
    etag = response.headers["ETag"]
    again = api.http.get(path, params={"draws": 50}, headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")
    other = api.http.get(path, params={"draws": 0}, headers={"If-None-Match": etag})
    assert (other.status_code, other.json()["stability"]) == (200, {"draws": 0, "method": None})


def test_what_does_not_fit_is_explained_by_its_conflict(api, plans_path):
    (plan,) = solve(api, plans_path, budgets=["bytes<=10"])
    body = api.http.get(plan["links"]["explanation"]).json()
    assert (body["status"], body["decisions"], body["conflict"]) == ("infeasible", [], plan["conflict"])
    assert body["least_budget"] == plan["least_budget"]
    assert api.http.get("/v1/plans/plan_nowhere/explanation").status_code == 404
    assert api.http.get(plan["links"]["explanation"], params={"draws": 10**6}).status_code == 422


def test_between_two_totals_the_frontier_has_every_plan(api, finished_job):
    path = f"/v1/jobs/{finished_job['id']}/frontier"
    corners = api.http.get(path).json()["items"]
    assert all(one["gap"] <= 1e-9 and one["price"] is not None for one in corners)
    low, high = corners[1]["resources"]["bytes"], corners[4]["resources"]["bytes"]
    body = api.http.get(path, params={"between": f"{low},{high} B"}).json()
    used = [one["resources"]["bytes"] for one in body["items"]]
    assert (body["complete"], body["next_between"]) == (True, None)
    assert {one["resources"]["bytes"] for one in corners[1:5]} <= set(used)
    few = api.http.get(path, params={"between": f"{low},{high}", "points": 2}).json()
    assert (few["complete"], [one["resources"]["bytes"] for one in few["items"]]) == (False, used[-2:])
    rest = ",".join(map(str, few["next_between"]))
    assert api.http.get(path, params={"between": rest}).json()["items"] == body["items"][:-2]
    for wrong in ("12", "9,8", "1,many"):
        assert api.http.get(path, params={"between": wrong}).status_code == 422


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
