"""Keys, quotas and the audit log on the command line, and the key that commands bring to a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from service.access import Access, Scope, digest_of, new_key
from service.client import Client
from service.db.engine import Database
from service.db.repositories import audit, keys
from service.remote.key import find_key


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return "--data-dir", tmp_path_factory.mktemp("keys")


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITPLAN_KEY", raising=False)
    monkeypatch.delenv("BITPLAN_KEY_FILE", raising=False)


def database(place: tuple[str, Path]) -> Database:
    return Database(f"sqlite:///{place[1]}/bitplan.db")


def test_a_key_is_shown_once_and_only_its_digest_is_kept(
    answer: Callable[..., Any], bitplan: Callable[..., Result], place: tuple[str, Path]
) -> None:
    made = answer(
        "keys", "create", "--tenant", "vision", "--scope", "read", "--name", "ci", "--days", 9, *place
    )
    assert (made["tenant"], made["scope"], made["state"], made["name"]) == ("vision", "read", "active", "ci")
    with database(place).read() as session:
        stored = keys.find(session, made["prefix"])
    assert stored is not None
    assert stored.digest == digest_of(made["key"])
    listed = answer("keys", "list", *place)
    assert made["key"] not in json.dumps(listed)
    assert {**made, "key": None} in [{**row, "key": None} for row in listed]
    assert made["id"] in bitplan("keys", "list", "--tenant", "vision", *place).stdout
    assert made["key"].encode() not in (place[1] / "bitplan.db").read_bytes()


def test_people_see_the_key_and_what_it_means(
    bitplan: Callable[..., Result], place: tuple[str, Path]
) -> None:
    shown = bitplan("keys", "create", *place).stdout
    assert "scope submit, tenant default" in shown
    assert "not shown again" in shown
    assert "\nbitplan_" in shown


def test_a_key_may_go_to_a_file_of_its_owner(
    bitplan: Callable[..., Result], place: tuple[str, Path], tmp_path: Path, no_key: None
) -> None:
    file = tmp_path / "key"
    done = bitplan("keys", "create", "--output", file, *place)
    assert (file.stat().st_mode & 0o777) == 0o600
    token = find_key(file=file)
    assert token is not None
    assert token not in done.stdout
    again = bitplan("keys", "create", "--output", file, *place)
    assert again.exit_code == 1
    assert find_key(file=file) == token


def test_a_key_is_revoked_by_its_id(
    answer: Callable[..., Any], bitplan: Callable[..., Result], place: tuple[str, Path]
) -> None:
    made = answer("keys", "create", *place)
    assert answer("keys", "revoke", made["id"], *place)["state"] == "revoked"
    refused = bitplan("keys", "revoke", "key_0", *place)
    assert refused.exit_code == 2
    assert "Got 'key_0'. List them" in refused.stderr


@pytest.mark.parametrize("tenant", ["", "A", "a/b", "../x", "x" * 65])
def test_a_tenant_is_a_plain_name(
    bitplan: Callable[..., Result], place: tuple[str, Path], tenant: str
) -> None:
    refused = bitplan("keys", "create", "--tenant", tenant, *place)
    assert refused.exit_code == 2
    assert "A tenant must be" in refused.stderr


def test_quotas_are_set_shown_and_reset(
    answer: Callable[..., Any], bitplan: Callable[..., Result], place: tuple[str, Path]
) -> None:
    tenant = ("--tenant", "vision")
    (row,) = answer("quotas", *tenant, "--jobs", 3, "--bytes", "2 KiB", "--running", 1, *place)
    assert row == {
        "tenant": "vision",
        "jobs": {"limit": 3, "used": 0},
        "bytes": {"limit": 2048, "used": 0},
        "running": {"limit": 1, "used": 0},
    }
    assert "0 of 2,048" in bitplan("quotas", *place).stdout
    assert answer("quotas", *tenant, "--bytes", "0", *place)[0]["bytes"]["limit"] is None
    assert answer("quotas", *tenant, "--reset", *place)[0]["jobs"]["limit"] == 1000
    assert bitplan("quotas", "--jobs", 3, *place).exit_code == 2
    assert bitplan("quotas", *tenant, "--bytes", "much", *place).exit_code == 2


def test_the_audit_log_is_shown(
    answer: Callable[..., Any], bitplan: Callable[..., Result], place: tuple[str, Path]
) -> None:
    bitplan("migrate", *place)
    with database(place).write() as session:
        for tenant in ("vision", "text"):
            audit.begin(
                session,
                Access(tenant, Scope.SUBMIT, "key_1"),
                action="submit",
                method="POST",
                path="/v1/jobs",
                peer="192.0.2.1",
                request_id="req_1",
                status=202,
            )
    assert [row["tenant"] for row in answer("audit", *place)] == ["text", "vision"]
    (row,) = answer("audit", "--tenant", "vision", *place)
    assert (row["action"], row["status"], row["key_id"]) == ("submit", 202, "key_1")
    assert "req_1" in bitplan("audit", "--limit", 1, *place).stdout


def test_a_service_beyond_this_machine_is_refused_without_keys(
    bitplan: Callable[..., Result], tmp_path: Path
) -> None:
    refused = bitplan("serve", "--host", "0.0.0.0", "--data-dir", tmp_path)
    assert refused.exit_code == 2
    assert "bitplan keys create" in refused.stderr


def test_the_key_of_a_client_is_given_or_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None
) -> None:
    given, named, variable = (new_key().token for _ in range(3))
    file, other = tmp_path / "given", tmp_path / "named"
    file.write_text(given + "\n")
    other.write_text(named)
    assert find_key() is None
    monkeypatch.setenv("BITPLAN_KEY_FILE", str(other))
    assert find_key() == named
    monkeypatch.setenv("BITPLAN_KEY", variable)
    assert find_key() == variable
    assert find_key(file=file) == given
    assert find_key(named, file) == named
    with Client("http://127.0.0.1:1", key=given) as client:
        assert client.transport.http.headers["Authorization"] == f"Bearer {given}"


def test_what_is_no_key_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, bitplan: Callable[..., Result], tmp_path: Path, no_key: None
) -> None:
    monkeypatch.setenv("BITPLAN_KEY", "my-secret-password")
    refused = bitplan("jobs", "--server", "http://127.0.0.1:1")
    assert refused.exit_code == 2
    assert "BITPLAN_KEY must hold a key" in refused.stderr
    assert "secret" not in refused.stderr
    assert bitplan("jobs", "--key-file", tmp_path / "none").exit_code == 2
