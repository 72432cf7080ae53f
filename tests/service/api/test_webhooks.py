"""Webhooks of jobs over the API: what is refused, what is never shown, and the way to the receiver."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.client import Client
from service.runner.deliveries import deliveries_of
from service.webhooks.signing import new_secret, verify
from tests.service.receiver import Receiver, receiving

SECRET = new_secret()
HOOK = {"url": "https://hooks.example.com/bitplan", "secret": SECRET}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def test_the_secret_is_never_shown(api, runner, capsys):
    job = api.submit(webhook=HOOK)
    runner.run(job["id"])
    paths = ["/v1/jobs", *(f"/v1/jobs/{job['id']}{part}" for part in ("", "/events", "/webhook", "/plans"))]
    shown = json.dumps(job) + "".join(api.http.get(path).text for path in paths)
    assert SECRET.removeprefix("whsec_") not in shown
    assert "webhook" not in job["request"]
    assert SECRET not in "".join(capsys.readouterr())


def test_the_webhook_says_how_far_it_is(api, runner):
    job = api.submit(webhook=HOOK)
    found = api.http.get(f"/v1/jobs/{job['id']}/webhook").json()
    assert found["id"].startswith("msg_")
    assert (found["url"], found["state"], found["attempts"]) == (HOOK["url"], "waiting", 0)
    assert found["next_attempt_at"] is found["last_status"] is found["settled_at"] is None
    runner.run(job["id"])
    assert api.http.get(f"/v1/jobs/{job['id']}/webhook").json()["state"] == "pending"


def test_a_job_without_one_says_so(api, finished_job):
    response = api.http.get(f"/v1/jobs/{finished_job['id']}/webhook")
    assert (response.status_code, response.json()["type"]) == (404, "urn:bitplan:problem:webhook-not-found")
    assert api.http.get("/v1/jobs/job_1/webhook").json()["type"] == "urn:bitplan:problem:job-not-found"


def test_from_a_job_to_its_receiver(settings, receiver, make_api):
    settings = settings.model_copy(update={"webhook_networks": ("127.0.0.0/8",)})
    with TestClient(create_app(settings)) as http:
        api, runner = make_api(http)
        job = api.submit(webhook={"url": receiver.url, "secret": SECRET}, name="mine")
        runner.run(job["id"])
        deliveries = deliveries_of(settings, api.context.database)
        assert deliveries.deliver_one()
        assert not deliveries.deliver_one()
        (got,) = receiver.received
        message = verify(SECRET, got.headers, got.body)
        assert (message["type"], message["data"]["name"]) == ("job.succeeded", "mine")
        assert http.get(message["data"]["links"]["plans"]).status_code == 200
        found = http.get(f"/v1/jobs/{job['id']}/webhook").json()
        assert (found["state"], found["last_status"], found["attempts"]) == ("delivered", 204, 1)


@pytest.mark.parametrize(
    ("webhook", "slug", "pointer"),
    [
        ({**HOOK, "url": "https://169.254.169.254/"}, "webhook-refused", "/webhook/url"),
        ({**HOOK, "url": "https://localhost/"}, "webhook-refused", "/webhook/url"),
        ({**HOOK, "url": "http://hooks.example.com/"}, "webhook-refused", "/webhook/url"),
        ({**HOOK, "url": "https://hooks.example.com:22/"}, "webhook-refused", "/webhook/url"),
        ({**HOOK, "url": "ftp://hooks.example.com/"}, "invalid-webhook", "/webhook/url"),
        ({**HOOK, "url": "https://me:pass@hooks.example.com/"}, "invalid-webhook", "/webhook/url"),
        ({**HOOK, "secret": "whsec_short"}, "invalid-webhook", "/webhook/secret"),
        ({"url": HOOK["url"]}, "invalid-request", "/webhook/secret"),
        ({**HOOK, "events": ["all"]}, "invalid-request", "/webhook/events"),
    ],
)
def test_what_cannot_be_told_is_refused(api, webhook, slug, pointer):
    response = api.http.post("/v1/jobs", json=api.request(webhook=webhook))
    assert response.status_code == 422
    problem = response.json()
    assert (problem["type"], problem["pointer"]) == (f"urn:bitplan:problem:{slug}", pointer)
    assert not any(word in response.text for word in ("whsec_short", "pass@", SECRET))
    assert api.http.get("/v1/jobs").json()["items"] == []


def test_another_webhook_is_another_request(api):
    request = api.request(webhook=HOOK)
    key = {"Idempotency-Key": "k"}
    first = api.http.post("/v1/jobs", json=request, headers=key)
    assert api.http.post("/v1/jobs", json=request, headers=key).json() == first.json()
    for other in (None, {**HOOK, "secret": new_secret()}, {**HOOK, "url": "https://other.example.com/"}):
        answer = api.http.post("/v1/jobs", json={**request, "webhook": other}, headers=key)
        assert (answer.status_code, answer.json()["type"]) == (
            422,
            "urn:bitplan:problem:idempotency-key-reused",
        )


def test_a_resumed_job_has_a_webhook_of_its_own(api):
    job = api.submit(webhook=HOOK)
    path = f"/v1/jobs/{job['id']}"
    api.http.post(f"{path}/cancel")
    plain = api.http.post(f"{path}/resume").json()
    assert api.http.get(f"/v1/jobs/{plain['id']}/webhook").status_code == 404
    client = Client(http=api.http)
    hooked = client.job(job["id"]).resume(webhook=HOOK)
    assert hooked.webhook()["state"] == "waiting"
    refused = api.http.post(f"{path}/resume", json={"webhook": {**HOOK, "url": "https://10.0.0.1/"}})
    assert (refused.status_code, refused.json()["pointer"]) == (422, "/webhook/url")
