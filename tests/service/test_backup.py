"""A backup taken while a service writes has every file that its rows name; and it comes back."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import make_url, text

from service import backup
from service.backup import BackupError, BackupRefused, back_up, missing_blobs, restore
from service.db import migrate
from service.db.engine import Database, parse_url
from service.db.repositories import jobs, leases, retention, runners, score_sets, units
from service.db.repositories.leases import Owner
from service.retention import collect
from service.settings import Settings
from service.states import JobKind
from service.store.blobs import BlobStore

OWNER = Owner("o" * 32, "host", 1, "p")
SET = "a" * 64


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=database_url)


@pytest.fixture
def elsewhere(tmp_path: Path, empty_database_url: str) -> Iterator[Settings]:
    """An empty place of the same kind."""
    folder = tmp_path / "elsewhere"
    if empty_database_url.startswith("sqlite"):
        yield Settings(data_dir=folder, database_url=f"sqlite:///{folder / 'bitplan.db'}")
        return
    url = make_url(empty_database_url)
    other = url.set(database=f"{url.database}_restored")
    with closing(Database(empty_database_url)) as database:
        engine = database.engine.execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f'CREATE DATABASE "{other.database}"'))
        yield Settings(data_dir=folder, database_url=other.render_as_string(hide_password=False))
        with engine.connect() as connection:
            connection.execute(text(f'DROP DATABASE "{other.database}" WITH (FORCE)'))


def measure(settings: Settings, database: Database, number: int) -> None:
    """What a runner does with a result: arrays into the store, then their row."""
    artifact = BlobStore(settings.data_dir).put_arrays({"x": np.array([number])})
    with database.write() as session:
        score_sets.ensure(session, SET, {"model": "m"})
        units.insert(
            session,
            score_set=SET,
            key=f"unit {number}",
            kind="score",
            unit={},
            facts={},
            artifact=artifact,
            job_id=None,
        )


@contextmanager
def measuring(settings: Settings, database: Database) -> Iterator[threading.Event]:
    """A thread that measures all the time; the event says that it has begun."""
    done, begun = threading.Event(), threading.Event()

    def work() -> None:
        for number in count():
            measure(settings, database, number)
            if number >= 5:
                begun.set()
            if done.is_set():
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(60)
        yield begun
    finally:
        done.set()
        thread.join()


def test_a_backup_of_a_service_at_work_comes_back_whole(
    settings: Settings, database: Database, elsewhere: Settings, tmp_path: Path
) -> None:
    with database.write() as session:
        waiting = jobs.create(session, kind=JobKind.SEARCH, request={"é": 0.1}, request_digest="d")
        running = jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="e")
        leases.claim_job(session, running.id, OWNER, -1)
        runners.beat(session, OWNER, "1", "")
    (settings.data_dir / "cursor.key").parent.mkdir(exist_ok=True)
    (settings.data_dir / "cursor.key").write_bytes(b"secret")
    with measuring(settings, database):
        made = back_up(settings, tmp_path / "backup")
    assert made.blobs >= 6
    assert restore(elsewhere, tmp_path / "backup") == made
    assert (elsewhere.data_dir / "cursor.key").read_bytes() == b"secret"
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0
    with closing(Database(elsewhere.database_url)) as restored:
        assert missing_blobs(elsewhere, restored) == []
        with restored.write() as session:
            assert jobs.get(session, waiting.id) == waiting
            assert len(units.keys(session, SET)) >= 6
            assert runners.list_all(session) == ()
            assert {leases.claim(session, OWNER, 60).id for _ in range(2)} == {waiting.id, running.id}  # type: ignore[union-attr]


def test_the_database_comes_first(settings: Settings, database: Database, tmp_path: Path) -> None:
    """What is written between the two copies is only in the files; the other way round it would be lost."""
    url, right, wrong = parse_url(settings.database_url), tmp_path / "right", tmp_path / "wrong"
    for folder in (right, wrong):
        folder.mkdir()
    measure(settings, database, 0)
    backup.copy_database(url, right)
    backup.copy_blobs(settings.data_dir, wrong)
    measure(settings, database, 1)
    backup.copy_blobs(settings.data_dir, right)
    backup.copy_database(url, wrong)
    with database.read() as session:
        named = {digest for _, digest in retention.promised_blobs(session)}
    assert [len(named - {path.name for path in backup._blobs_in(folder)}) for folder in (right, wrong)] == [
        0,
        1,
    ]


SQLITE = pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)


@SQLITE
def test_a_restore_says_what_is_lost(
    settings: Settings, database: Database, elsewhere: Settings, tmp_path: Path
) -> None:
    measure(settings, database, 0)
    back_up(settings, tmp_path / "backup")
    (blob,) = backup._blobs_in(tmp_path / "backup")
    content = blob.read_bytes()
    blob.chmod(0o600)
    blob.write_bytes(b"rotten")
    with pytest.raises(BackupError, match="The backup is damaged"):
        restore(elsewhere, tmp_path / "backup")
    blob.unlink()
    with pytest.raises(BackupError, match=f"Got 1 missing: {blob.name}"):
        restore(elsewhere, tmp_path / "backup")
    blob.write_bytes(content)
    with pytest.raises(BackupRefused, match="Got some with content"):
        restore(elsewhere, tmp_path / "backup")
    shutil.rmtree(elsewhere.data_dir)
    restore(elsewhere, tmp_path / "backup")


@SQLITE
def test_the_same_folder_again_copies_what_is_new(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    folder = tmp_path / "backup"
    measure(settings, database, 0)
    back_up(settings, folder)
    (first,) = backup._blobs_in(folder)
    before = first.stat().st_mtime_ns
    measure(settings, database, 1)
    assert back_up(settings, folder).blobs == 2
    assert first.stat().st_mtime_ns == before
    BlobStore(settings.data_dir).remove(first.name)
    assert back_up(settings, folder).blobs == 1
    assert not first.exists()


@SQLITE
def test_nothing_is_collected_meanwhile(
    settings: Settings, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.store import sweep

    monkeypatch.setattr(sweep, "PATIENCE_SECONDS", 0.0)
    measure(settings, database, 0)
    copy = backup.copy_blobs

    def deleted_in_between(data_dir: Path, folder: Path) -> tuple[int, int]:
        import os

        (blob,) = backup._blobs_in(data_dir)
        os.utime(blob, (0, 0))
        with database.write() as session:
            session.execute(text("UPDATE score_sets SET created_at = '2020-01-01 00:00:00'"))
        found = collect(settings, database) or ()
        assert {item.what: item.count for item in found if item.count} == {"score sets": 1}
        return copy(data_dir, folder)

    monkeypatch.setattr(backup, "copy_blobs", deleted_in_between)
    assert back_up(settings, tmp_path / "backup").blobs == 1
    assert {item.what for item in collect(settings, database) or () if item.count} == {"blobs"}


@SQLITE
def test_what_does_not_fit_is_refused(
    settings: Settings, database: Database, elsewhere: Settings, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").touch()
    with pytest.raises(BackupRefused, match="holds something else"):
        back_up(settings, tmp_path / "home")
    with pytest.raises(BackupRefused, match="without backup.json, which is written last"):
        restore(elsewhere, tmp_path / "home")
    with pytest.raises(migrate.DatabaseNotReady):
        back_up(elsewhere, tmp_path / "empty")
    back_up(settings, tmp_path / "backup")
    postgres = elsewhere.model_copy(update={"database_url": "postgresql://nobody@127.0.0.1:1/none"})
    with pytest.raises(BackupRefused, match="its kind of database, sqlite"):
        restore(postgres, tmp_path / "backup")
    manifest = tmp_path / "backup" / "backup.json"
    manifest.write_text(manifest.read_text().replace(migrate.newest(), "9999"))
    with pytest.raises(migrate.DatabaseTooNew):
        restore(elsewhere, tmp_path / "backup")
    manifest.write_text("[]")
    with pytest.raises(BackupRefused, match="must be what `bitplan backup` wrote"):
        restore(elsewhere, tmp_path / "backup")


def test_passwords_are_not_shown_and_a_missing_program_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run(arguments: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.extend(arguments)
        assert env["PGPASSWORD"] == "hidden"
        return subprocess.CompletedProcess(arguments, 1, "", "pg_dump: error: no such host\n")

    url = parse_url("postgresql://me:hidden@host/name")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(BackupError, match="Got exit code 1: pg_dump: error: no such host"):
        backup.copy_database(url, tmp_path)
    assert "--dbname=postgresql://me@host/name" in seen
    assert "hidden" not in " ".join(seen)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackupError, match="Install the client programs"):
        backup.copy_database(url, tmp_path)
