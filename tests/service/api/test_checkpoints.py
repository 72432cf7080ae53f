"""Checkpoints over HTTP: asking for one, refusals, and downloads whole and in parts."""

import pytest

from quant.catalog import CHECKPOINTS
from service.states import JobState

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def solve(api, runner, finished_job):
    """solve(budget, **members): a plan of the finished job, whose model was verified."""
    runner.verify(finished_job["request"]["model"])

    def ask(budget, **members):
        body = {"budgets": [budget], **members}
        response = api.http.post(f"/v1/jobs/{finished_job['id']}/plans", json=body)
        assert response.status_code == 201, response.text
        return response.json()["items"][0]

    return ask


@pytest.fixture
def plan(solve):
    return solve("4 bpw")


@pytest.fixture
def ask(api, plan):
    """ask(consumer, **members): the response to the request for a checkpoint."""

    def post(consumer="vllm", headers=None, **members):
        body = {"consumer": consumer, **members}
        return api.http.post(f"/v1/plans/{plan['id']}/checkpoint", json=body, headers=headers)

    return post


@pytest.fixture
def fetch(api, plan):
    def get(consumer="vllm", **headers):
        return api.http.get(
            f"/v1/plans/{plan['id']}/checkpoint", params={"consumer": consumer}, headers=headers
        )

    return get


@pytest.fixture
def write(api, runner, ask):
    """write(): the job of a checkpoint that a runner has written."""

    def run(content=CONTENT, **members):
        job = ask(**members).json()
        held = runner.start(job["id"])
        sha256 = api.context.store.put_bytes(content)
        summary = {"sha256": sha256, "bytes": len(content), "file": "bitplan-vllm.tar"}
        runner.finish(held, summary=summary)
        return api.http.get(f"/v1/jobs/{job['id']}").json()

    return run


def slug(response):
    return response.json()["type"].rpartition(":")[2]


def test_a_job_is_queued_and_asking_twice_is_one_job(api, ask, plan):
    first, again = ask(), ask(headers={"Idempotency-Key": "k"})
    assert (first.status_code, again.status_code) == (202, 202)
    job = first.json()
    assert (job["kind"], job["state"]) == ("write_checkpoint", "queued")
    assert first.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert job["links"]["checkpoint"] == f"/v1/plans/{plan['id']}/checkpoint?consumer=vllm"
    assert again.json()["id"] == job["id"]
    assert ask("pytorch").json()["id"] != job["id"]
    assert ask(force=True).json()["id"] != job["id"]
    assert ask(headers={"Idempotency-Key": "k"}, consumer="pytorch").status_code == 422
    kinds = api.http.get("/v1/jobs", params={"kind": "write_checkpoint"}).json()["items"]
    assert len(kinds) == 3


def test_what_cannot_be_read_is_refused(ask):
    unknown = ask("nobody")
    assert (unknown.status_code, slug(unknown)) == (422, "unknown-consumer")
    assert unknown.json()["pointer"] == "/consumer"
    assert "or GET /v1/plans/{id}/exports/mlx" in ask("mlx").json()["detail"]
    assert ask(other=1).status_code == 422


def planned_with(api, runner, schemes):
    """A plan of a job with this menu, and the job's request."""
    job = api.submit(schemes=schemes)
    runner.verify(job["request"]["model"])
    runner.run(job["id"])
    return api.http.get(f"/v1/jobs/{job['id']}/plans").json()["items"][0], job["request"]


def test_a_refusal_lists_every_violation(api, runner):
    plan, _ = planned_with(api, runner, ["w2-tensor", "w4-tensor"])
    response = api.http.post(f"/v1/plans/{plan['id']}/checkpoint", json={"consumer": "vllm"})
    assert (response.status_code, slug(response)) == (422, "checkpoint-refused")
    violations = response.json()["violations"]
    assert {item["layer"] for item in violations} == set(plan["document"]["layers"])
    assert all("scales must be" in item["rule"] and item["got"] for item in violations)
    assert api.http.get("/v1/jobs", params={"kind": "write_checkpoint"}).json()["items"] == []


def test_calibration_data_that_a_quantizer_needs_must_still_be_there(api, runner):
    plan, request = planned_with(api, runner, ["w2-gptq", "w4-gptq"])
    path, body = f"/v1/plans/{plan['id']}/checkpoint", {"consumer": "vllm"}
    assert api.http.delete(f"/v1/calibrations/{request['calibration']}").status_code == 204
    response = api.http.post(path, json=body)
    assert (response.status_code, slug(response)) == (409, "calibration-deleted")
    assert plan["document"]["digests"]["calibration"] in response.json()["detail"]
    assert api.calibration() != request["calibration"]
    assert api.http.post(path, json=body).status_code == 202


def test_a_plan_that_fits_nothing_has_no_checkpoint(api, solve):
    plan = solve("0.1 bpw")
    response = api.http.post(f"/v1/plans/{plan['id']}/checkpoint", json={"consumer": "pytorch"})
    assert response.status_code == 409
    assert "A plan must fit its budget" in response.json()["detail"]


def test_a_deleted_model_has_no_new_checkpoints(api, ask, finished_job):
    assert api.http.delete(f"/v1/models/{finished_job['request']['model']}").status_code == 204
    response = ask()
    assert (response.status_code, slug(response)) == (409, "model-deleted")


def test_nothing_to_download_yet(api, runner, ask, fetch):
    none = fetch()
    assert (none.status_code, slug(none)) == (404, "checkpoint-not-found")
    job = ask().json()
    waiting = fetch()
    assert (waiting.status_code, slug(waiting)) == (409, "checkpoint-not-ready")
    assert waiting.headers["Retry-After"] == "1"
    assert waiting.json()["job"] == job["id"]
    problem = {"type": "urn:bitplan:problem:disk-full", "detail": "No room.", "status": 507}
    runner.finish(runner.start(job["id"]), JobState.FAILED, problem=problem)
    failed = fetch()
    assert (failed.status_code, slug(failed)) == (409, "checkpoint-not-written")
    assert "No room." in failed.json()["detail"]
    assert failed.json()["cause"] == problem
    assert ask().json()["id"] != job["id"]
    assert api.http.get("/v1/plans/plan_none/checkpoint", params={"consumer": "vllm"}).status_code == 404


def test_downloads_whole_in_parts_and_once(write, ask, fetch):
    job = write()
    assert ask().json()["id"] == job["id"]
    whole = fetch()
    assert (whole.status_code, whole.content) == (200, CONTENT)
    assert whole.headers["ETag"] == f'"{job["summary"]["sha256"]}"'
    assert whole.headers["Content-Type"] == "application/x-tar"
    assert whole.headers["Content-Disposition"] == 'attachment; filename="bitplan-vllm.tar"'
    part = fetch(Range="bytes=1000-1999")
    assert (part.status_code, part.content) == (206, CONTENT[1000:2000])
    assert fetch(Range="bytes=5-", **{"If-Range": whole.headers["ETag"]}).content == CONTENT[5:]
    assert fetch(Range="bytes=5-", **{"If-Range": '"other"'}).content == CONTENT
    assert fetch(Range="bytes=99999-").status_code == 416
    many = fetch(Range="bytes=" + ",".join(f"{at}-{at}" for at in range(1000)))
    assert (many.status_code, many.content) == (200, CONTENT)
    unchanged = fetch(**{"If-None-Match": whole.headers["ETag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")


def test_the_newest_file_is_served_while_another_is_being_written(write, ask, fetch):
    write()
    assert ask(force=True).json()["state"] == "queued"
    assert fetch().content == CONTENT


def test_deleting_the_job_deletes_its_file(api, write, fetch, ask):
    job = write()
    digest = job["summary"]["sha256"]
    other = write(force=True)
    assert api.http.delete(f"/v1/jobs/{other['id']}").status_code == 204
    assert api.context.store.has(digest)
    assert api.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert not api.context.store.has(digest)
    assert fetch().status_code == 404
    assert ask().json()["state"] == "queued"


def test_a_file_that_is_gone_is_written_again(api, write, fetch, ask):
    job = write()
    api.context.store.remove(job["summary"]["sha256"])
    gone = fetch()
    assert (gone.status_code, slug(gone)) == (409, "checkpoint-not-written")
    again = ask().json()
    assert (again["state"], again["id"] != job["id"]) == ("queued", True)
    assert slug(fetch()) == "checkpoint-not-ready"


def test_consumers_are_listed(api):
    items = api.http.get("/v1/checkpoints").json()["items"]
    assert [item["name"] for item in items] == list(CHECKPOINTS)
    assert {item["writes"] for item in items} <= {"folder", "file"}
