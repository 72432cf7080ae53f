"""At least once: a delivery survives errors, crashes and kill -9, and what cannot be delivered says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.db.engine import Database
from service.db.repositories import jobs, webhooks
from service.failpoints import FailpointReached
from service.metrics import RUNNER
from service.records import JobRecord, WebhookRecord
from service.runner.deliveries import PAUSES, Deliveries, deliveries_of, delivering
from service.settings import Settings
from service.states import JobKind
from service.webhooks.guard import Guard
from service.webhooks.sending import Sender
from service.webhooks.signing import new_secret, verify
from tests.service.receiver import Receiver, receiving

SECRET = new_secret()
LOCAL = Guard.of(["127.0.0.0/8"])
TOY = Path(__file__).with_name("toy_deliveries.py")
ROOT = Path(__file__).parents[3]
SQLITE = pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
End = Callable[[str], JobRecord]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def ended(database: Database) -> End:
    """ended(url): a job that was cancelled and whose webhook is due."""

    def make(url: str) -> JobRecord:
        request = {"name": "mine", "labels": {"team": "a"}}
        with database.write() as session:
            job = jobs.create(session, kind=JobKind.SEARCH, request=request, request_digest="d")
            webhooks.create(session, job.id, url, SECRET)
            return jobs.request_cancel(session, job.id)

    return make


@pytest.fixture
def told(database: Database) -> Callable[[JobRecord], WebhookRecord]:
    def read(job: JobRecord) -> WebhookRecord:
        with database.read() as session:
            found = webhooks.of_job(session, job.id)
        assert found is not None
        return found

    return read


def deliveries(
    database: Database, guard: Guard = LOCAL, pauses: tuple[float, ...] = (0.0, 0.0)
) -> Deliveries:
    return Deliveries(database, Sender(guard), pauses=pauses, lease_seconds=0.0)


def test_the_receiver_learns_how_the_job_ended(database, receiver, ended, told):
    job = ended(receiver.url)
    work = deliveries(database)
    assert work.deliver_one()
    assert not work.deliver_one()
    (got,) = receiver.received
    message = verify(SECRET, got.headers, got.body)
    assert message["type"] == "job.cancelled"
    assert message["timestamp"].endswith("Z")
    assert message["data"] == {
        "id": job.id,
        "kind": "search",
        "state": "cancelled",
        "name": "mine",
        "labels": {"team": "a"},
        "problem": None,
        "links": {"self": f"/v1/jobs/{job.id}", "plans": f"/v1/jobs/{job.id}/plans"},
    }
    record = told(job)
    assert (record.state, record.attempts, record.last_status) == ("delivered", 1, 204)
    assert got.headers["webhook-id"] == record.id


def test_errors_are_tried_again_under_the_same_id(database, receiver, ended, told):
    job = ended(receiver.url)
    receiver.statuses = [500, 429]
    work = deliveries(database)
    while work.deliver_one():
        pass
    assert len(receiver.received) == 3
    assert len({got.headers["webhook-id"] for got in receiver.received}) == 1
    assert len({got.body for got in receiver.received}) == 1
    assert [told(job).state, told(job).attempts, told(job).last_error] == ["delivered", 3, None]


def test_after_the_last_attempt_it_is_given_up_with_the_reason(database, receiver, ended, told):
    job = ended(receiver.url)
    receiver.statuses = [500] * 9
    work = deliveries(database)
    while work.deliver_one():
        pass
    record = told(job)
    assert RUNNER.get_sample_value("bitplan_webhook_attempts_total", {"outcome": "given_up"}) >= 1
    assert len(receiver.received) == record.attempts == 3
    assert (record.state, record.last_status, record.last_error) == ("failed", 500, "HTTP status 500")
    assert record.secret is None


def test_what_is_blocked_is_given_up_at_once(database, receiver, ended, told, capsys):
    job = ended(receiver.url)
    assert deliveries(database, Guard()).deliver_one()
    record = told(job)
    assert (record.state, record.attempts, record.last_status) == ("failed", 1, None)
    assert str(record.last_error).startswith("blocked: A webhook's host must have public addresses only")
    assert receiver.received == []
    assert SECRET not in "".join(capsys.readouterr())


def test_attempts_wait_longer_and_longer(database, receiver, ended, told):
    assert list(PAUSES) == sorted(PAUSES)
    job = ended(receiver.url)
    receiver.statuses = [500]
    work = Deliveries(database, Sender(LOCAL), lease_seconds=0.0)
    before = told(job).next_attempt_at
    assert work.deliver_one()
    assert told(job).next_attempt_at - before >= PAUSES[0]
    assert not work.deliver_one()


def test_a_crash_after_the_answer_sends_it_again(database, receiver, ended, told, monkeypatch):
    job = ended(receiver.url)
    monkeypatch.setattr("service.failpoints._passes", Counter())
    monkeypatch.setenv("BITPLAN_FAILPOINTS", "webhook.after_send=raise")
    work = deliveries(database)
    with pytest.raises(FailpointReached):
        work.deliver_one()
    assert told(job).state == "pending"
    monkeypatch.delenv("BITPLAN_FAILPOINTS")
    assert work.deliver_one()
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    assert (told(job).state, told(job).attempts) == ("delivered", 2)


def test_a_delivery_that_ends_its_process_each_time_is_given_up(database, receiver, ended, told):
    job = ended(receiver.url)
    for _ in range(6):
        with database.write() as session:
            webhooks.claim(session, 0.0)
    assert deliveries(database).deliver_one()
    assert told(job).last_error == "the process that sends it has ended at each attempt"
    assert receiver.received == []


def test_threads_deliver_while_a_runner_runs(database, ended, receiver, told, settings):
    every = [ended(receiver.url) for _ in range(5)]
    allowed = Settings(**{**settings.model_dump(), "webhook_networks": ("127.0.0.0/8",)})
    arrived = threading.Event()
    with delivering(deliveries_of(allowed, database), 0.02, threads=2):
        for _ in range(1500):
            if all(told(job).state == "delivered" for job in every):
                arrived.set()
                break
            arrived.wait(0.02)
    assert arrived.is_set()
    ids = [json.loads(got.body)["data"]["id"] for got in receiver.received]
    assert sorted(ids) == sorted(job.id for job in every)


@SQLITE
@pytest.mark.slow
@pytest.mark.parametrize(("place", "times"), [("webhook.before_send", 1), ("webhook.after_send", 2)])
def test_a_killed_process_loses_no_delivery(
    database, database_url, tmp_path, receiver, ended, told, place, times
):
    job = ended(receiver.url)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BITPLAN_DATA_DIR": str(tmp_path),
        "BITPLAN_DATABASE_URL": database_url,
        "BITPLAN_WEBHOOK_NETWORKS": "127.0.0.0/8",
    }
    command = [sys.executable, str(TOY)]
    deadly = {**environment, "BITPLAN_FAILPOINTS": f"{place}=kill"}
    killed = subprocess.run(command, env=deadly, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert told(job).state == "pending"
    subprocess.run(command, env=environment, timeout=120, check=True)
    assert told(job).state == "delivered"
    assert len(receiver.received) == times
    assert len({got.headers["webhook-id"] for got in receiver.received}) == 1
