"""Keys, scopes, tenants, quotas, rates and the audit log over HTTP: one application for all tests here."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient

from service import logs
from service.access import Scope, new_key
from service.api.buckets import Buckets
from service.api.gate import KEY_SECONDS, Gate
from service.api.guarded import Guarded
from service.api.scopes import OPEN, SCOPES
from service.app import ROUTERS, create_app
from service.db.repositories import audit, keys, plans, tenants
from service.settings import Settings

from .conftest import Api, FakeRunner, model_content

PLACES = {
    "upload_id": "upload_0",
    "model_id": "model_0",
    "calibration_id": "cal_0",
    "job_id": "job_0",
    "plan_id": "plan_0",
    "sha256": "0" * 64,
    "consumer": "vllm",
}
TEXT = "".join(f"line {number}\n" for number in range(20)).encode()
NOT_ANSWERS = {"instance", "detail"}


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class House:
    """An application with keys of two tenants; `http` brings none."""

    def __init__(self, http: TestClient) -> None:
        self.http, self.clock = http, Clock()
        self.context = http.app.state.context  # type: ignore[attr-defined]
        self.keys = {
            (tenant, scope): self.key(tenant, scope)[0] for tenant in ("default", "other") for scope in Scope
        }
        self.renew()

    def renew(self, **changes: Any) -> None:
        """A gate that has seen nothing yet, with other settings."""
        context = self.context
        changed = context.settings.model_copy(update=changes)
        self.http.app.state.context = replace(context, settings=changed)  # type: ignore[attr-defined]
        self.http.app.state.gate = Gate(self.http.app.state.context, self.clock)  # type: ignore[attr-defined]

    def key(self, tenant: str, scope: Scope, **more: Any) -> tuple[str, str]:
        made = new_key()
        with self.context.database.write() as session:
            record = keys.create(
                session, tenant=tenant, name="", scope=scope, prefix=made.prefix, digest=made.digest, **more
            )
        return made.token, record.id

    def ask(self, method: str, path: str, token: str | None = None, **more: Any) -> Any:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return self.http.request(method, path, headers=headers | more.pop("headers", {}), **more)

    def of(self, tenant: str, scope: Scope = Scope.SUBMIT) -> Callable[..., Any]:
        return lambda method, path, **more: self.ask(method, path, self.keys[tenant, scope], **more)

    def operations(self) -> Iterator[tuple[str, str, str]]:
        """(operation, method, path with ids of nothing) of everything in the OpenAPI document."""
        for path, item in self.http.get("/openapi.json").json()["paths"].items():
            for method, operation in item.items():
                yield operation["operationId"], method.upper(), path.format(**PLACES)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    settings = Settings(data_dir=tmp_path_factory.mktemp("access"), rate_limit=0)
    with TestClient(create_app(settings)) as http:
        yield House(http)


@pytest.fixture
def house(shared: House) -> Iterator[House]:
    yield shared
    shared.renew()


@pytest.fixture(scope="module")
def owned(shared: House) -> dict[str, str]:
    """Everything that a tenant can have, of tenant "default"."""
    shared.http.headers["Authorization"] = f"Bearer {shared.keys['default', Scope.SUBMIT]}"
    api = Api(shared.http)
    job = api.submit()
    FakeRunner(api).run(job["id"])
    upload = api.send({"calibration.txt": TEXT}, "calibration")
    del shared.http.headers["Authorization"]
    with shared.context.database.read() as session:
        (plan,) = plans.list_job(session, job["id"])
    return {
        "upload_id": upload["id"],
        "model_id": job["request"]["model"],
        "calibration_id": job["request"]["calibration"],
        "job_id": job["id"],
        "plan_id": plan.id,
        "sha256": hashlib.sha256(TEXT).hexdigest(),
    }


def slug(answer: Any) -> str:
    return str(answer.json()["type"].rpartition(":")[2])


# Scopes


def test_every_operation_has_a_scope_and_every_scope_an_operation(house: House) -> None:
    assert {name for name, _, _ in house.operations()} == set(SCOPES)
    routes = [route for router in ROUTERS for route in router.routes]
    assert [route for route in routes if not isinstance(route, Guarded)] == []
    assert {route.name for route in routes} == set(SCOPES)


def test_an_operation_without_a_scope_cannot_be_made() -> None:
    router = APIRouter(route_class=Guarded)
    with pytest.raises(LookupError, match="Every operation must have a scope. Got forgotten"):

        @router.get("/forgotten")
        def forgotten() -> None: ...


def test_writes_need_more_than_reading(house: House) -> None:
    for name, method, _ in house.operations():
        if method not in {"GET", "HEAD"}:
            assert SCOPES[name] in {Scope.SUBMIT, Scope.ADMIN}


def test_no_operation_answers_without_a_key_except_open_ones(house: House) -> None:
    for name, method, path in house.operations():
        answer = house.ask(method, path, content=b"{" if method == "POST" else None)
        if SCOPES[name] is OPEN:
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, name
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert method == "HEAD" or slug(answer) == "key-missing"


@pytest.mark.parametrize("scope", [Scope.READ, Scope.SUBMIT])
def test_no_operation_answers_a_key_of_a_smaller_scope(house: House, scope: Scope) -> None:
    for name, method, path in house.operations():
        needed = SCOPES[name]
        answer = house.of("default", scope)(method, path, content=b"{" if method == "POST" else None)
        if needed is None or scope.allows(needed):
            assert answer.status_code not in {401, 403}, name
        else:
            assert answer.status_code == 403, name
            assert answer.json()["needed"] == needed
            assert slug(answer) == "scope-too-small"


def test_the_document_says_the_scope_of_each_operation(house: House) -> None:
    document = house.http.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/v1/jobs"]["post"]["security"] == [{"key": ["submit"]}, {}]
    assert document["paths"]["/healthz"]["get"]["security"] == []


# Keys


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer x", "Basic abc", f"Bearer bitplan_{'0' * 12}_{'a' * 43}", "Bearer é", "Bearer  "],
)
def test_a_wrong_key_is_refused(house: House, header: str) -> None:
    answer = house.http.get("/v1/jobs", headers={"Authorization": header.encode()})
    assert (answer.status_code, slug(answer)) == (401, "key-unknown")


def test_the_public_part_of_a_key_is_not_enough(house: House) -> None:
    token = house.keys["default", Scope.READ]
    other = new_key().token
    assert house.ask("GET", "/v1/jobs", token[:20] + other[20:]).status_code == 401
    assert house.ask("GET", "/v1/jobs", token).status_code == 200


def test_a_revoked_key_is_refused_within_the_stated_time(house: House) -> None:
    token, ident = house.key("default", Scope.READ)
    assert house.ask("GET", "/v1/jobs", token).status_code == 200
    with house.context.database.write() as session:
        keys.revoke(session, ident)
    house.clock.now += KEY_SECONDS
    answer = house.ask("GET", "/v1/jobs", token)
    assert (answer.status_code, slug(answer)) == (401, "key-revoked")
    assert ident in answer.json()["detail"]


def test_a_key_that_was_seen_is_not_looked_up_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = house.of("default", Scope.READ)
    assert ask("GET", "/v1/formats").status_code == 200
    monkeypatch.setattr(keys, "find", lambda *_: pytest.fail("looked up"))
    assert ask("GET", "/v1/formats").status_code == 200


def test_an_expired_key_is_refused(house: House) -> None:
    token, _ = house.key("default", Scope.READ, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert slug(house.ask("GET", "/v1/jobs", token)) == "key-expired"


def test_whoever_tries_wrong_keys_must_wait_and_good_keys_go_on(house: House) -> None:
    good = house.of("default")
    assert good("GET", "/v1/jobs").status_code == 200
    answers = [house.ask("GET", "/v1/jobs", f"wrong {number}") for number in range(21)]
    assert [answer.status_code for answer in answers] == [401] * 20 + [429]
    assert slug(answers[-1]) == "wrong-keys"
    house.clock.now += KEY_SECONDS - 4.5
    assert good("GET", "/v1/jobs").status_code == 200
    house.clock.now += KEY_SECONDS
    assert good("GET", "/v1/jobs").status_code == 200


@pytest.mark.parametrize(
    "query", ["key=1", "api_key=1", "limit=1&Access_Token=x", "x=bitplan_0123456789ab_secret", "%6Bey=1"]
)
def test_a_key_in_the_query_string_is_refused(house: House, query: str) -> None:
    answer = house.of("default")("GET", f"/v1/jobs?{query}")
    assert (answer.status_code, slug(answer)) == (400, "key-in-query")
    assert "secret" not in answer.text


def test_no_log_shows_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    import structlog

    logs.configure("info")
    token = new_key().token
    structlog.get_logger().info(f"got {token}", header=f"Bearer {token}", number=3)
    shown = capsys.readouterr().err
    assert token[:21] in shown
    assert token[21:] not in shown
    logs.adopt_libraries("info")
    logging.getLogger("uvicorn.error").error("GET %s %d", f"/?x={token}", 200)
    shown = capsys.readouterr().err
    assert f"/?x={token[:21]}[redacted] 200" in shown
    assert token[21:] not in shown


def test_the_client_brings_its_key(house: House) -> None:
    from service.client import Client
    from service.remote.transport import ProblemError

    def client(scope: Scope | None) -> Client:
        key = None if scope is None else house.keys["other", scope]
        return Client(http=TestClient(house.http.app), key=key, retries=0)

    assert client(Scope.READ).jobs() == []
    with pytest.raises(ProblemError, match="Got none. Ask whoever runs the server"):
        client(None).jobs()
    with pytest.raises(ProblemError, match="must have the scope submit"):
        client(Scope.READ).submit("model_0", "cal_0", ["4 bpw"])


# Without keys


def without_keys(tmp_path: Path, address: str = "127.0.0.1", **settings: Any) -> TestClient:
    app = create_app(Settings(data_dir=tmp_path, **settings))
    return TestClient(app, client=(address, 50000), base_url="http://localhost:8000")


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], TestClient]]:
    """keyless(address): a client there, of a service without keys."""
    with without_keys(tmp_path_factory.mktemp("keyless")) as started:
        yield lambda address: TestClient(
            started.app, client=(address, 50000), base_url="http://localhost:8000"
        )


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_this_machine_needs_no_key_while_there_is_none(
    keyless: Callable[[str], TestClient], address: str
) -> None:
    http = keyless(address)
    assert http.get("/v1/limits").json()["quotas"] is None
    assert http.post("/v1/jobs", json={}).status_code == 422
    assert http.get("/v1/audit").json()["items"] == []


@pytest.mark.parametrize("address", ["192.0.2.7", "::ffff:10.0.0.1", "2001:db8::1"])
def test_other_machines_are_refused_while_there_is_no_key(
    keyless: Callable[[str], TestClient], address: str
) -> None:
    http = keyless(address)
    answer = http.get("/v1/limits")
    assert (answer.status_code, slug(answer)) == (403, "no-keys")
    assert f"Got one from {address}" in answer.json()["detail"]
    assert http.get("/healthz").status_code == 200


def test_pages_of_other_sites_are_refused_while_there_is_no_key(
    keyless: Callable[[str], TestClient],
) -> None:
    http = keyless("127.0.0.1")
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        assert http.get("/v1/limits", headers={"Host": host}).status_code == 200
    rebound = http.get("/v1/limits", headers={"Host": "rebound.example.org:8000"})
    foreign = http.post("/v1/jobs/job_0/cancel", headers={"Origin": "https://example.org"})
    own = http.post("/v1/jobs/job_0/cancel", headers={"Origin": "http://localhost:8000"})
    assert (slug(rebound), slug(foreign)) == ("foreign-host", "foreign-origin")
    assert own.status_code == 404


def test_from_the_first_key_on_everybody_needs_one(tmp_path: Path) -> None:
    clock = Clock()
    with without_keys(tmp_path) as http:
        http.app.state.gate = Gate(http.app.state.context, clock)  # type: ignore[attr-defined]
        assert http.get("/v1/limits").status_code == 200
        made = new_key()
        with http.app.state.context.database.write() as session:  # type: ignore[attr-defined]
            record = keys.create(
                session, tenant="a", name="", scope=Scope.READ, prefix=made.prefix, digest=made.digest
            )
        clock.now += KEY_SECONDS
        assert http.get("/v1/limits").status_code == 401
        with http.app.state.context.database.write() as session:  # type: ignore[attr-defined]
            keys.revoke(session, record.id)
        clock.now += KEY_SECONDS
        assert http.get("/v1/limits").status_code == 401


def test_access_may_be_opened_or_closed_explicitly(tmp_path: Path) -> None:
    with without_keys(tmp_path, "192.0.2.7", access="open") as http:
        assert http.post("/v1/jobs", json={}).status_code == 422
        (write,) = http.get("/v1/audit").json()["items"]
        assert (write["key"], write["peer"], write["status"]) == (None, "192.0.2.7", 422)
    with without_keys(tmp_path, access="keys") as http:
        assert slug(http.get("/v1/limits")) == "key-missing"


# Tenants


def test_another_tenants_things_are_as_unknown_as_wrong_ids(house: House, owned: Mapping[str, str]) -> None:
    for name, method, path in house.operations():
        used = {place: owned[place] for place in owned if PLACES[place] in path}
        if not used.keys() - {"sha256"}:
            continue
        theirs = path
        for place, ident in used.items():
            theirs = theirs.replace(PLACES[place], ident)
        query = "?resource=bytes&consumer=vllm"
        body = {"json": BODIES.get(name, {})} if method == "POST" else {}
        other = house.of("other", Scope.ADMIN)
        answer, unknown = other(method, theirs + query, **body), other(method, path + query, **body)
        assert (answer.status_code, unknown.status_code) == (404, 404), name
        if method != "HEAD":
            told = [
                {part: value for part, value in found.json().items() if part not in NOT_ANSWERS}
                for found in (answer, unknown)
            ]
            assert told[0] == told[1]
            words = [found.json()["detail"] for found in (answer, unknown)]
            for place, ident in used.items():
                words[0] = words[0].replace(ident, PLACES[place])
            assert words[0] == words[1]


BODIES: dict[str, Any] = {
    "solve_again": {"budgets": ["4 bpw"]},
    "write_checkpoint": {"consumer": "vllm"},
    "make_calibration": {"method": "random_tokens"},
    "correlate": {"budgets": ["4 bpw"]},
}


def test_another_tenants_things_cannot_be_named_in_bodies(house: House, owned: Mapping[str, str]) -> None:
    other = house.of("other")
    for model, calibration in (
        (owned["model_id"], owned["calibration_id"]),
        ("model_0", "cal_0"),
    ):
        answer = other(
            "POST",
            "/v1/jobs",
            json={"model": model, "calibration": calibration, "budgets": ["4 bpw"], "schemes": ["w4"]},
        )
        assert (answer.status_code, slug(answer)) == (422, "unknown-model")
    for path in ("/v1/models", "/v1/calibrations"):
        for upload in (owned["upload_id"], "upload_0"):
            assert other("POST", path, json={"upload": upload}).status_code == 404


def test_lists_hold_a_tenants_own_things(house: House, owned: Mapping[str, str]) -> None:
    for path in ("/v1/jobs", "/v1/models", "/v1/calibrations"):
        assert house.of("default", Scope.READ)("GET", path).json()["items"]
        assert house.of("other", Scope.ADMIN)("GET", path).json()["items"] == []


def test_a_digest_grants_nothing(house: House, owned: Mapping[str, str]) -> None:
    manifest = {
        "purpose": "calibration",
        "files": [{"path": "c.txt", "size": len(TEXT), "sha256": owned["sha256"]}],
    }
    other = house.of("other")
    upload = other("POST", "/v1/uploads", json=manifest).json()
    assert [blob["sha256"] for blob in upload["missing"]] == [owned["sha256"]]
    blob = f"/v1/uploads/{upload['id']}/blobs/{owned['sha256']}"
    assert other("HEAD", blob).headers["Upload-Complete"] == "?0"
    assert slug(other("POST", f"/v1/uploads/{upload['id']}/complete")) == "upload-incomplete"
    assert other("PATCH", blob, content=TEXT[:5]).status_code == 204
    partials = list((house.context.settings.data_dir / "partials").rglob(owned["sha256"]))
    assert [path.parts[-3] for path in partials] == ["other"]
    assert other("DELETE", f"/v1/uploads/{upload['id']}").status_code == 204
    assert other("GET", f"/v1/uploads/{upload['id']}").status_code == 404
    assert not partials[0].exists()


def test_the_same_file_of_two_tenants_is_two_models(house: House, owned: Mapping[str, str]) -> None:
    house.http.headers["Authorization"] = f"Bearer {house.keys['other', Scope.SUBMIT]}"
    try:
        upload = Api(house.http).send(model_content())
        made = house.http.post(f"/v1/uploads/{upload['id']}/complete").json()
        again = house.http.delete(f"/v1/uploads/{upload['id']}")
    finally:
        del house.http.headers["Authorization"]
    assert made["id"] != owned["model_id"]
    assert (again.status_code, slug(again)) == (409, "upload-complete")
    assert house.of("other")("DELETE", f"/v1/models/{made['id']}").status_code == 204


def test_an_idempotency_key_is_its_tenants(house: House) -> None:
    body = {"purpose": "calibration", "files": [{"path": "i.txt", "size": 1, "sha256": "1" * 64}]}
    made = [
        house.of(tenant)("POST", "/v1/uploads", json=body, headers={"Idempotency-Key": "same"}).json()["id"]
        for tenant in ("default", "other")
    ]
    assert made[0] != made[1]


# Quotas and rates


def test_jobs_beyond_the_quota_are_refused_with_what_to_do(house: House, owned: Mapping[str, str]) -> None:
    body = {
        "model": owned["model_id"],
        "calibration": owned["calibration_id"],
        "budgets": ["4 bpw"],
        "schemes": ["w4"],
    }
    ask = house.of("default")
    used = ask("GET", "/v1/limits").json()["quotas"]["jobs"]["used"]
    with house.context.database.write() as session:
        tenants.set_quotas(session, "default", {"jobs": used + 1})
    first = ask("POST", "/v1/jobs", json=body)
    second = ask("POST", "/v1/jobs", json=body)
    assert (first.status_code, second.status_code, slug(second)) == (202, 429, "too-many-jobs")
    assert second.headers["Retry-After"] == "10"
    assert second.json()["quota"] == {"name": "jobs", "limit": used + 1, "used": used + 1}
    assert "cancel one" in second.json()["detail"]
    ask("POST", f"/v1/jobs/{first.json()['id']}/cancel")
    assert ask("POST", "/v1/jobs", json=body).status_code == 202
    with house.context.database.write() as session:
        tenants.set_quotas(session, "default", {"jobs": None})


def test_bytes_beyond_the_quota_are_refused_before_they_are_sent(house: House) -> None:
    def declare(name: str, size: int) -> Any:
        file = {"path": name, "size": size, "sha256": hashlib.sha256(name.encode()).hexdigest()}
        return ask("POST", "/v1/uploads", json={"purpose": "calibration", "files": [file]})

    ask = house.of("other")
    used = ask("GET", "/v1/limits").json()["quotas"]["bytes"]["used"]
    house.renew(quota_bytes=f"{used + 100} B")
    first, again, second = declare("a.txt", 80), declare("a.txt", 80), declare("b.txt", 21)
    assert (first.status_code, again.json()["id"]) == (201, first.json()["id"])
    assert (second.status_code, slug(second)) == (507, "too-many-bytes")
    assert second.json()["quota"] == {"name": "bytes", "limit": used + 100, "used": used + 80, "asked": 21}
    ask("DELETE", f"/v1/uploads/{first.json()['id']}")
    assert declare("b.txt", 21).status_code == 201


def test_a_key_that_asks_too_often_must_wait(house: House) -> None:
    house.renew(rate_limit=2.0, rate_burst=3)
    ask = house.of("default", Scope.READ)
    answers = [ask("GET", "/v1/formats") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 3 + [429]
    assert (answers[3].headers["Retry-After"], slug(answers[3])) == ("1", "rate-limited")
    assert (answers[3].json()["per_second"], answers[3].json()["burst"]) == (2.0, 3)
    assert house.of("other", Scope.READ)("GET", "/v1/formats").status_code == 200
    house.clock.now += 0.5
    assert ask("GET", "/v1/formats").status_code == 200


def test_buckets_fill_to_the_brim_and_forget_whom_they_have_not_seen() -> None:
    clock = Clock()
    buckets = Buckets(1.0, 2, clock)
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 1]
    clock.now += 100
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 1]
    assert buckets.wait("a") == 1
    assert buckets.wait("b") == 0
    for number in range(10_000):
        buckets.take(str(number))
    assert buckets.wait("a") == 0


# The audit log


def test_every_write_is_in_the_audit_log_with_its_outcome(house: House) -> None:
    admin = house.of("other", Scope.ADMIN)
    made = admin("POST", "/v1/models", json={"upload": "upload_0"})
    house.of("other", Scope.READ)("POST", "/v1/jobs", json={})
    house.of("other")("POST", "/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
    house.of("default")("POST", "/v1/jobs/job_9/cancel")
    answer = admin("GET", "/v1/audit?limit=3")
    items = answer.json()["items"]
    assert [(item["action"], item["status"]) for item in items] == [
        ("submit", 422),
        ("submit", 403),
        ("create_model", 404),
    ]
    assert items[2]["request_id"] == made.headers["X-Request-Id"]
    assert items[2]["key"].startswith("key_")
    assert items[2]["path"] == "/v1/models"
    assert answer.headers["Cache-Control"] == "no-store"
    rest = admin("GET", f"/v1/audit?cursor={answer.json()['next_cursor']}").json()["items"]
    assert {item["id"] for item in rest}.isdisjoint(item["id"] for item in items)
    assert not any("job_9/cancel" in item["path"] for item in (*items, *rest))


def test_a_write_that_breaks_is_in_the_audit_log(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.api import jobs

    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(jobs, "find_job", broken)
    with pytest.raises(RuntimeError):
        house.of("other")("POST", "/v1/jobs/job_7/cancel")
    (newest,) = house.of("other", Scope.ADMIN)("GET", "/v1/audit?limit=1").json()["items"]
    assert (newest["path"], newest["status"]) == ("/v1/jobs/job_7/cancel", 500)


def test_a_write_that_cannot_be_logged_is_not_done(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    def full(*_: object, **__: object) -> str:
        raise OperationalError("INSERT", {}, Exception("disk is full"))

    monkeypatch.setattr(audit, "begin", full)
    body = {"purpose": "calibration", "files": [{"path": "z.txt", "size": 1, "sha256": "2" * 64}]}
    assert house.of("other")("POST", "/v1/uploads", json=body).status_code == 503
    assert house.of("other", Scope.READ)("GET", "/v1/jobs").status_code == 200


def test_reads_are_not_in_the_audit_log(house: House) -> None:
    admin = house.of("default", Scope.ADMIN)
    before = admin("GET", "/v1/audit").json()
    house.of("default", Scope.READ)("GET", "/v1/jobs")
    assert admin("GET", "/v1/audit").json()["items"] == before["items"]


# Headers


def test_every_answer_has_the_security_headers(house: House) -> None:
    ask = house.of("default")
    for answer in (
        ask("GET", "/v1/jobs"),
        ask("GET", "/nothing"),
        ask("DELETE", "/v1/jobs"),
        house.ask("GET", "/v1/jobs"),
        ask("POST", "/v1/jobs", json={}),
        house.ask("GET", "/docs"),
        ask("GET", "/v1/jobs?key=x"),
    ):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["X-Request-ID"])
        assert "Strict-Transport-Security" not in answer.headers
    assert ask("GET", "/v1/jobs").headers["Cache-Control"] == "private, no-cache"
    assert ask("GET", "/v1/jobs").headers["Vary"] == "Authorization"
    assert ask("POST", "/v1/jobs", json={}).headers["Cache-Control"] == "no-store"


def test_an_unexpected_error_has_them_too(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path))

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError

    with TestClient(app, raise_server_exceptions=False) as http:
        answer = http.get("/broken")
    assert answer.status_code == 500
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_over_tls_browsers_are_told_to_stay_there(house: House) -> None:
    answer = house.http.get("https://testserver/healthz")
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"


def test_the_pages_run_only_their_own_scripts_and_load_nothing_from_other_hosts(house: House) -> None:
    for path in ("/docs", "/redoc"):
        page = house.http.get(path)
        assert "http://" not in page.text.replace("http://www.w3.org", "")
        assert "https://" not in page.text
        (policy,) = re.findall(r"script-src ([^;]*);", page.headers["Content-Security-Policy"])
        for script in re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
        assert "unsafe" not in policy
        for file in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert house.http.get(file).status_code == 200
