"""Bodies and names of strangers that are no files: bounded, bound to statements, and shown as they are."""

from __future__ import annotations

import asyncio
import json

import pytest
from sqlalchemy import text

from service.api.guarded import LARGEST_BODY

HOSTILE = [
    "'; DROP TABLE jobs; --",
    "<script>alert(1)</script>",
    '=HYPERLINK("http://evil.example")',
    "{{7*7}}",
]


def posted(api, content: bytes):
    return api.http.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("content", "statuses"),
    [
        (b"[" * 100 + b"]" * 100, {400, 422}),
        (b'{"model":' * 100 + b"1" + b"}" * 100, {400, 422}),
        (b"[" * 1_000_000, {400, 413, 422}),
        (b'{"model": "a", "model": "b"}', {400, 422}),
        (b'{"model": "\xff\xfe"}', {400, 422}),
        (b'{"model": "\xed\xa0\x80"}', {400, 422}),
        (b'{"seed": ' + b"9" * 100_000 + b"}", {400, 413, 422}),
    ],
)
def test_bodies_that_are_no_request(api, content, statuses):
    response = posted(api, content)
    assert response.status_code in statuses
    assert response.headers["Content-Type"] == "application/problem+json"


def test_a_body_of_50_megabytes_is_refused_by_its_length(api):
    headers = {"Content-Type": "application/json", "Content-Length": str(50 * 2**20)}
    response = api.http.post("/v1/jobs", content=b"{}", headers=headers)
    assert response.status_code == 413
    assert response.json()["type"].endswith("too-large")


def test_a_body_without_end_is_left(api):
    """What has come is dropped at the limit: nobody waits for the rest."""
    answer, asked = [], 0

    async def receive():
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": b"[" * 2**20, "more_body": True}

    async def send(message):
        answer.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/jobs",
        "raw_path": b"/v1/jobs",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"testserver")],
        "client": ("testclient", 50000),
        "server": ("testserver", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    asyncio.run(api.http.app(scope, receive, send))
    start, body = answer[:2]
    assert start["status"] == 413
    assert json.loads(body["body"])["type"].endswith("too-large")
    assert asked == LARGEST_BODY // 2**20 + 1


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_kept_as_they_are_and_run_nowhere(api, name):
    job = api.submit(name=name, labels={"who": name})
    assert job["request"]["name"] == name
    response = api.http.get("/v1/jobs")
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert [item["request"]["name"] for item in response.json()["items"]] == [name]
    for path in (f"/v1/jobs/{name}", f"/v1/models/{name}", f"/v1/plans/{name}"):
        assert api.http.get(path).status_code == 404
    for query in ("state", "kind", "cursor"):
        assert api.http.get("/v1/jobs", params={query: name}).status_code in {400, 422}
    with api.context.database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM jobs")) >= 1


@pytest.mark.parametrize("member", ["pins", "exclude", "include", "forbid"])
def test_a_pattern_of_many_stars_is_answered(api, runner, member):
    body = api.request()
    runner.verify(body["model"])
    stars = "*" * 1990 + "x"
    given = {"pins": {stars: "w4"}, "forbid": {stars: ["w4"]}}.get(member, [stars])
    response = api.http.post("/v1/jobs", json=body | {member: given})
    assert response.status_code == 422
    assert response.json()["type"].endswith("unknown-layer")


def test_problems_show_no_more_of_what_was_sent_than_fits(api):
    response = api.http.post("/v1/jobs", json=api.request(budgets=["x" * 1900]))
    assert response.status_code == 422
    assert len(json.dumps(response.json())) < 10_000
