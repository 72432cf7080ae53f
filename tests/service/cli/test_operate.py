"""`bitplan gc`, `doctor`, `backup` and `restore`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from service import doctor
from service.store.blobs import BlobStore

Bitplan = Callable[..., Result]
Ask = Callable[..., Any]


@pytest.fixture
def data(tmp_path: Path, bitplan: Bitplan, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory of a migrated service."""
    monkeypatch.setenv("BITPLAN_DATA_DIR", str(tmp_path / "data"))
    assert bitplan("migrate").exit_code == 0
    return tmp_path / "data"


def test_gc_says_what_it_would_do_and_does_it(data: Path, answer: Ask, bitplan: Bitplan) -> None:
    store = BlobStore(data)
    blob = store.put_bytes(b"nobody's")
    os.utime(store.path(blob), (0, 0))
    found = answer("gc", "--dry-run")
    assert found["dry_run"]
    assert {"what": "blobs", "count": 1, "bytes": 8} in found["collected"]
    assert store.has(blob)
    assert "would be deleted" in bitplan("gc", "--dry-run").stdout
    result = bitplan("gc")
    assert "8 B" in result.stdout
    assert not store.has(blob)


def test_gc_needs_a_database(tmp_path: Path, bitplan: Bitplan) -> None:
    result = bitplan("gc", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert "Got an empty database" in result.stderr


def found(checks: Any) -> dict[str, str]:
    return {check["name"]: check["state"] for check in checks["checks"]}


def test_doctor_finds_a_service_healthy(data: Path, answer: Ask, bitplan: Bitplan) -> None:
    checks = answer("doctor")
    assert checks["healthy"]
    states = found(checks)
    assert {
        states[name] for name in ("python", "torch", "executor", "database", "schema", "store", "clock")
    } == {"ok"}
    assert states["runner"] == "warning"
    assert states["isolation"] in ("ok", "warning")
    assert {name for name in states if name.startswith("extra ")} == {
        "extra demo",
        "extra diffusion",
        "extra exports",
        "extra parquet",
        "extra ray",
    }
    shown = bitplan("doctor").stdout
    assert "none is known: jobs wait" in shown


def test_doctor_makes_nothing(tmp_path: Path, answer: Ask) -> None:
    checks = answer("doctor", "--data-dir", tmp_path / "none")
    assert checks["healthy"]
    assert found(checks)["database"] == "warning"
    assert not (tmp_path / "none").exists()


def test_doctor_says_what_is_wrong(data: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.db.engine import Database

    database = Database(f"sqlite:///{data / 'bitplan.db'}")
    with database.write_connection() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    monkeypatch.setenv("BITPLAN_EXECUTOR", "hope")
    (data / "cursor.key").touch(mode=0o644)
    data.chmod(0o777)
    checks = answer("doctor", code=1)
    assert not checks["healthy"]
    states = found(checks)
    assert (states["schema"], states["executor"], states["permissions"]) == ("failed", "failed", "warning")
    text = " ".join(check["detail"] for check in checks["checks"])
    for words in ("Run `bitplan migrate`", "BITPLAN_EXECUTOR must be one of", "chmod o-w", "chmod 600"):
        assert words in text


def test_doctor_says_where_models_are_not_isolated(
    data: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def isolation(code: int = 0) -> tuple[str, str]:
        (check,) = [one for one in answer("doctor", code=code)["checks"] if one["name"] == "isolation"]
        return check["state"], check["detail"]

    gap = "network not isolated: unshare: Operation not permitted"
    monkeypatch.setattr(doctor, "gaps_here", lambda: (gap,))
    monkeypatch.setenv("BITPLAN_EXECUTOR", "local_pool")
    assert isolation() == ("warning", gap)
    monkeypatch.setenv("BITPLAN_ISOLATION", "require")
    assert isolation(code=1) == ("failed", gap)
    monkeypatch.setenv("BITPLAN_ISOLATION", "off")
    assert isolation()[0] == "warning"
    monkeypatch.setenv("BITPLAN_EXECUTOR", "in_process")
    assert isolation() == ("warning", "in_process runs models in the runner's own process")


def test_backup_and_restore(data: Path, tmp_path: Path, answer: Ask, bitplan: Bitplan) -> None:
    BlobStore(data).put_bytes(b"a blob")
    made = answer("backup", tmp_path / "copy")
    assert (made["database"], made["blobs"], made["bytes"]) == ("sqlite", 1, 6)
    assert answer("restore", tmp_path / "copy", "--data-dir", tmp_path / "new") == made
    assert (tmp_path / "new" / "bitplan.db").exists()
    again = bitplan("restore", tmp_path / "copy")
    assert again.exit_code == 2
    assert "Got some with content" in again.stderr
    assert "1 files of 6 B" in bitplan("backup", tmp_path / "copy").stdout
