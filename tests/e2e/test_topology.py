"""The topology of docker-compose.yml on one machine: PostgreSQL, `migrate`, two APIs and two runners, by the commands that
stand in the file. Processes are killed while jobs run; and what one API promises, two keep together.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.db.repositories import events, scores, units
from service.remote.handles import JobHandle
from service.states import TERMINAL
from tests.e2e.conftest import empty_postgres
from tests.e2e.topology import Topology

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.timeout(900)]

ROLES = ("api", "api-2", "runner", "runner-2")
CLUSTER = ("ray-head", "ray-worker", "ray-worker-2", "api", "api-2", "runner-cluster", "runner-cluster-2")
SCHEMES, METRICS = ("w2", "w4"), ("output_kl", "fisher")
SEARCH = {"schemes": SCHEMES, "metrics": METRICS, "batch_size": 4, "evaluations": 1}
BUDGETS = ("3 bpw", "uniform w4")
JOB_SECONDS = 250
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def topology(tmp_path_factory) -> Iterator[Topology]:
    with running(tmp_path_factory.mktemp("topology"), ROLES) as topology:
        yield topology


@contextmanager
def running(folder: Path, roles: Sequence[str]) -> Iterator[Topology]:
    """These roles on a database of their own, supervised; their logs are shown when a test fails.

    The first runner that has stored four results dies of it.
    """
    once = folder / "once"
    once.mkdir(parents=True)
    dying = {"BITPLAN_FAILPOINTS": "runner.after_store:4=kill", "BITPLAN_FAILPOINTS_ONCE": str(once)}
    with empty_postgres() as url:
        topology = Topology(folder, url, dying, roles=roles)
        try:
            topology.start().supervise()
            yield topology
        finally:
            topology.stop()
            for role in topology.started:
                print(f"--- {role}", *topology.log(role).splitlines()[-40:], sep="\n")


@pytest.fixture
def api(topology) -> Iterator[httpx2.Client]:
    with plain(topology, "api") as client:
        yield client


@pytest.fixture
def other(topology) -> Iterator[httpx2.Client]:
    with plain(topology, "api-2") as client:
        yield client


def plain(topology: Topology, role: str, key: str = "") -> httpx2.Client:
    headers = {"Authorization": f"Bearer {key or topology.key}"}
    return httpx2.Client(base_url=topology.url_of(role), headers=headers, timeout=60)


class Follower(threading.Thread):
    """Reads the stream of events of a job at one API, over cuts, to its end."""

    def __init__(self, job: JobHandle) -> None:
        super().__init__(daemon=True)
        self._job, self.seen = job, list[dict[str, Any]]()

    def run(self) -> None:
        self.seen += self._job.follow()


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def check_complete(topology: Topology, jobs: list[JobHandle]) -> None:
    """Every score once, none doubted; one terminal event, the last."""
    transport = topology.client_of("api").transport
    layers = {
        name: [layer["name"] for layer in transport.get(f"/v1/models/{name}/layers")["layers"]]
        for name in {job.resource["request"]["model"] for job in jobs}
    }
    with topology.database() as database, database.read() as session:
        for job in jobs:
            resource = job.resource
            story = [event.type for event in events.list_after(session, job.id)]
            assert [kind for kind in story if kind in TERMINAL] == ["succeeded"]
            assert story[-1] == "succeeded"
            found = [
                (row.layer, row.scheme, row.metric)
                for row in scores.list_all(session, resource["score_set"])
                if row.metric in METRICS
            ]
            assert len(found) == len(set(found))
            assert set(found) == set(product(layers[resource["request"]["model"]], SCHEMES, METRICS))
            assert units.faults(session, resource["score_set"]) == ()


def test_jobs_outlive_runners_and_apis(topology, resnet, llama) -> None:
    one, two = topology.client_of("api"), topology.client_of("api-2")
    jobs = [
        one.submit(resnet.folder, resnet.calibration, BUDGETS, samples=8, **SEARCH),
        one.submit(resnet.folder, resnet.calibration, BUDGETS, samples=10, **SEARCH),
        one.submit(llama.folder, llama.calibration, BUDGETS, samples=8, sequence_length=12, **SEARCH),
    ]
    followers = [Follower(two.job(job.id)) for job in jobs]
    for follower in followers:
        follower.start()
    until((topology.folder / "once" / "runner.after_store.4.kill").exists, "a runner must measure, and die")
    for role in ("api", "api-2"):
        assert topology.kill(role)
        until(lambda role=role: topology.deaths[role] == 1, "what died must be seen")
        topology.wait_until_healthy(role)
    ended = [two.job(job.id).wait(timeout=JOB_SECONDS) for job in jobs]
    assert [job.state for job in ended] == ["succeeded"] * len(jobs)
    assert topology.deaths.total() == 3
    assert topology.deaths["runner"] + topology.deaths["runner-2"] == 1
    check_complete(topology, ended)
    check_streams(followers, ended)


def check_streams(followers: list[Follower], jobs: list[JobHandle]) -> None:
    """Who followed a job saw each of its events once, in order."""
    for follower, job in zip(followers, jobs, strict=True):
        follower.join(PATIENCE_SECONDS)
        assert follower.seen == job.events()
        assert [event["seq"] for event in follower.seen] == list(range(1, len(follower.seen) + 1))


def test_health_checks_tell_who_is_down(topology) -> None:
    assert all(topology.healthy(role) for role in ROLES)
    down = Topology(topology.folder / "down", topology.database_url, roles=ROLES)
    assert not down.healthy("api")


def test_an_upload_begins_at_one_api_and_ends_at_the_other(api, other, llama) -> None:
    data = (llama.calibration.read_text() + '{"text": "somewhat more"}\n').encode()
    sha = hashlib.sha256(data).hexdigest()
    manifest = {"purpose": "calibration", "files": [{"path": "rows.jsonl", "size": len(data), "sha256": sha}]}
    upload = api.post("/v1/uploads", json=manifest).json()
    place = f"/v1/uploads/{upload['id']}/blobs/{sha}"
    half = len(data) // 2
    first = api.patch(place, content=data[:half], headers={"Upload-Offset": "0"})
    assert first.headers["Upload-Offset"] == str(half)
    assert other.post("/v1/uploads", json=manifest).json()["id"] == upload["id"]
    assert other.head(place).headers["Upload-Offset"] == str(half)
    assert other.patch(place, content=data[half:], headers={"Upload-Offset": "0"}).status_code == 409
    assert other.patch(place, content=data[half:], headers={"Upload-Offset": str(half)}).status_code == 204
    done = other.post(f"/v1/uploads/{upload['id']}/complete")
    assert done.status_code == 201, done.text
    again = api.post(f"/v1/uploads/{upload['id']}/complete")
    assert again.json()["id"] == done.json()["id"]


def test_an_idempotency_key_is_one_for_both(topology, api, other, resnet) -> None:
    client = topology.client_of("api")
    body = {
        "model": client.upload_model(resnet.folder)["id"],
        "calibration": client.upload_calibration(resnet.calibration)["id"],
        "budgets": ["3 bpw"],
        "schemes": list(SCHEMES),
        "samples": 8,
        "evaluations": 0,
    }
    header = {"Idempotency-Key": "once"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda api: api.post("/v1/jobs", json=body, headers=header), [api, other] * 4)
        )
    while any(answer.status_code == 409 for answer in answers):
        time.sleep(1)
        answers = [
            other.post("/v1/jobs", json=body, headers=header) if answer.status_code == 409 else answer
            for answer in answers
        ]
    assert {answer.status_code for answer in answers} == {202}, [answer.text for answer in answers]
    assert len({answer.json()["id"] for answer in answers}) == 1
    changed = {**body, "samples": 9}
    for each in (api, other):
        refused = each.post("/v1/jobs", json=changed, headers=header)
        assert (refused.status_code, refused.json()["type"]) == (
            422,
            "urn:bitplan:problem:idempotency-key-reused",
        )
    job = answers[0].json()["id"]
    assert topology.client_of("api-2").job(job).wait(timeout=JOB_SECONDS).state == "succeeded"


def test_what_one_api_answers_the_other_understands(topology, api, other) -> None:
    """Cursors, ETags, plans of the other's jobs, and what is known of runners."""
    page = api.get("/v1/jobs", params={"limit": 1}).json()
    following = other.get("/v1/jobs", params={"limit": 1, "cursor": page["next_cursor"]})
    assert following.status_code == 200, following.text
    assert following.json()["items"][0]["id"] != page["items"][0]["id"]
    job = next(job for job in topology.client_of("api").jobs() if job.resource["kind"] == "search")
    tag = api.get(f"/v1/jobs/{job.id}").headers["ETag"]
    assert other.get(f"/v1/jobs/{job.id}", headers={"If-None-Match": tag}).status_code == 304
    solved = topology.client_of("api-2").job(job.id).solve(["3.5 bpw"])
    assert {plan.id for plan in solved} <= {plan.id for plan in topology.client_of("api").job(job.id).plans()}
    for each in (api, other):
        lines = each.get("/metrics").text.splitlines()
        alive = [line for line in lines if line.startswith("bitplan_runner_up{") and line.endswith(" 1.0")]
        assert len(alive) == 2


def test_keys_and_quotas_hold_at_both(topology, api, other, resnet) -> None:
    made = json.loads(topology.once("api", ["bitplan", "keys", "create", "--tenant", "small", "--json"]))
    topology.once("api", ["bitplan", "quotas", "--tenant", "small", "--bytes", "1 KiB"])
    content = b"x" * 700
    with plain(topology, "api", made["key"]) as one, plain(topology, "api-2", made["key"]) as two:
        assert [each.get("/v1/jobs").json()["items"] for each in (one, two)] == [[], []]
        manifests = [
            {
                "purpose": "calibration",
                "files": [
                    {"path": "rows.txt", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                ],
            }
            for data in (content, content + b"y")
        ]
        assert one.post("/v1/uploads", json=manifests[0]).status_code == 201
        refused = two.post("/v1/uploads", json=manifests[1])
        assert (refused.status_code, refused.json()["type"]) == (507, "urn:bitplan:problem:too-many-bytes")
        topology.once("api", ["bitplan", "keys", "revoke", made["id"]])
        for each in (one, two):
            until(lambda each=each: each.get("/v1/jobs").status_code == 401, "a revoked key must be refused")


def test_rates_are_counted_by_each_process(topology) -> None:
    made = json.loads(topology.once("api", ["bitplan", "keys", "create", "--scope", "read", "--json"]))
    strict = {"BITPLAN_RATE_LIMIT": "0.001", "BITPLAN_RATE_BURST": "5"}
    more = Topology(topology.folder / "strict", topology.database_url, strict, roles=("api",))
    more.start_role("api")
    try:
        more.wait_until_healthy("api")
        with plain(more, "api", made["key"]) as limited, plain(topology, "api", made["key"]) as usual:
            codes = [limited.get("/v1/jobs").status_code for _ in range(7)]
            assert codes == [200] * 5 + [429] * 2
            assert usual.get("/v1/jobs").status_code == 200
    finally:
        more.stop()


def test_nothing_is_open_without_a_key(topology) -> None:
    for role in ("api", "api-2"):
        refused = httpx2.get(f"{topology.url_of(role)}/v1/jobs", timeout=60)
        assert (refused.status_code, refused.json()["type"]) == (401, "urn:bitplan:problem:key-missing")


def test_no_process_shows_the_password(topology) -> None:
    password = (topology.folder / "secrets" / "postgres_password").read_text().strip()
    if not password:
        pytest.skip("this PostgreSQL server asks for no password")
    for role in ROLES:
        pid = topology.pid(role)
        shown = subprocess.run(
            ["ps", "-p", str(pid), "-o", "args", "e"], capture_output=True, text=True, check=False
        )
        assert "service" in shown.stdout
        assert f":{password}@" not in shown.stdout
        assert f":{password}@" not in topology.log(role)


def test_a_cluster_loses_a_node_and_no_score(tmp_path, resnet, llama) -> None:
    """The profile `cluster`: a head and two nodes, two APIs and two runners. A runner and a node die while a job runs."""
    with running(tmp_path / "cluster", CLUSTER) as cluster:
        one, two = cluster.client_of("api"), cluster.client_of("api-2")
        jobs = [
            one.submit(resnet.folder, resnet.calibration, BUDGETS, samples=8, **SEARCH),
            one.submit(llama.folder, llama.calibration, BUDGETS, samples=8, sequence_length=12, **SEARCH),
        ]
        followers = [Follower(two.job(job.id)) for job in jobs]
        for follower in followers:
            follower.start()
        until(
            (cluster.folder / "once" / "runner.after_store.4.kill").exists, "a runner must measure, and die"
        )
        assert cluster.kill("ray-worker")
        ended = [two.job(job.id).wait(timeout=JOB_SECONDS) for job in jobs]
        assert [job.state for job in ended] == ["succeeded"] * len(jobs)
        assert cluster.deaths["ray-worker"] == 1
        assert cluster.deaths["runner-cluster"] + cluster.deaths["runner-cluster-2"] == 1
        assert any(cluster.logged("ray.sent", role) for role in CLUSTER if role.startswith("runner"))
        check_complete(cluster, ended)
        check_streams(followers, ended)
        for role in CLUSTER:
            cluster.wait_until_healthy(role)
