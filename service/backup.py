"""A copy of everything that a service knows, taken while it works, and back.

The database is copied first, then the files: a row is committed after its file was published, so each file
that the copied rows name was there before the copy of files began. It is still there when they are copied,
because nobody removes files meanwhile: the backup shares the lock that removal must hold alone. The other
order would lose what was written in between. Restoring goes the other way round, files first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from service.db import migrate
from service.db.engine import Database, parse_url
from service.db.repositories import retention, runners
from service.settings import Settings
from service.store.blobs import CHUNK_BYTES, BlobStore, is_digest, lock_of
from service.store.durable import make_folder, sync_file, sync_folder
from service.store.lock import shared

MANIFEST, SQLITE_FILE, POSTGRES_FILE = "backup.json", "bitplan.db", "bitplan.dump"
KEPT_FILES = ("cursor.key", "latency")
"""What else of a data directory cannot be made again for nothing."""
SHOWN = 5


class BackupError(RuntimeError):
    """A backup that could not be taken or given back whole; the message says why and what to do."""


class BackupRefused(ValueError):  # noqa: N818 - an error is named after what went wrong
    """Folders or databases that do not fit together; nothing was changed."""


@dataclass(frozen=True)
class Backup:
    """What a folder holds: `database` is sqlite or postgresql, `bytes` those of its blobs."""

    database: str
    schema_version: str
    bitplan: str
    at: str
    blobs: int
    bytes: int


def back_up(settings: Settings, folder: Path) -> Backup:
    """Copy database and files into `folder`; into an earlier backup only the blobs that it lacks.

    An interrupted backup has no manifest; taking it again completes it. Raises `BackupRefused`,
    `BackupError`, `DatabaseNotReady` and `DatabaseTooNew`.
    """
    url = parse_url(settings.database_url)
    _require_a_place(folder)
    with closing(Database(settings.database_url)) as database:
        migrate.check(database)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    with shared(lock_of(settings.data_dir)):
        copy_database(url, folder)
        blobs, size = copy_blobs(settings.data_dir, folder)
    for name in KEPT_FILES:
        _copy(settings.data_dir / name, folder / name)
    made = Backup(
        url.get_backend_name(),
        migrate.newest(),
        version("bitplan"),
        datetime.now(UTC).isoformat(timespec="seconds"),
        blobs,
        size,
    )
    _write(folder / MANIFEST, json.dumps(asdict(made), indent=1).encode())
    return made


def copy_database(url: URL, folder: Path) -> None:
    """One consistent snapshot, while others write."""
    name = SQLITE_FILE if url.drivername == "sqlite" else POSTGRES_FILE
    growing, final = folder / f".{name}", folder / name
    growing.unlink(missing_ok=True)
    if url.drivername == "sqlite":
        with closing(sqlite3.connect(str(url.database))) as source:
            source.execute("VACUUM INTO ?", (str(growing),))
    else:
        _run_client("pg_dump", url, "--format=custom", "--no-owner", "--no-privileges", f"--file={growing}")
    with growing.open("r+b") as file:
        sync_file(file)
    growing.replace(final)
    sync_folder(folder)


def copy_blobs(data_dir: Path, folder: Path) -> tuple[int, int]:
    """Copy the blobs that the backup lacks, drop those that the store no longer has; how many there are now,
    and their bytes.
    """
    count = size = 0
    known = {path.relative_to(folder) for path in _blobs_in(folder)}
    for path in _blobs_in(data_dir):
        place = path.relative_to(data_dir)
        if place not in known:
            _copy_blob(path, folder / place)
        known.discard(place)
        count, size = count + 1, size + path.stat().st_size
    for place in known:
        (folder / place).unlink()
    return count, size


def restore(settings: Settings, folder: Path) -> Backup:
    """Give a backup back, into an empty data directory and an empty database, and bring it to this schema.

    Every blob is hashed on its way, and every blob that a row names must be there. Raises `BackupRefused`,
    `BackupError` and `DatabaseTooNew`.
    """
    found, url = read_manifest(folder), parse_url(settings.database_url)
    _require_fitting(found, url)
    _require_empty(settings, url)
    for path in _blobs_in(folder):
        _restore_blob(settings.data_dir, path)
    for name in KEPT_FILES:
        _copy(folder / name, settings.data_dir / name)
    if url.drivername == "sqlite":
        file = Path(str(url.database))
        make_folder(file.parent)
        _copy_blob(folder / SQLITE_FILE, file)
        file.chmod(0o600)
    else:
        _run_client(
            "pg_restore",
            url,
            "--no-owner",
            "--no-privileges",
            "--single-transaction",
            "--exit-on-error",
            str(folder / POSTGRES_FILE),
        )
    migrate.upgrade(settings.database_url)
    with closing(Database(settings.database_url)) as database:
        _forget_runners(database)
        lost = missing_blobs(settings, database)
    if lost:
        shown = ", ".join(digest for _, digest in lost[:SHOWN])
        raise BackupError(
            f"Every blob that a row names must be in the backup. Got {len(lost)} missing: {shown}. What needs"
            " them must be sent or measured again; everything else was restored."
        )
    return found


def missing_blobs(settings: Settings, database: Database) -> list[retention.Blob]:
    """The blobs that rows name and the store does not have, as tenant and digest."""
    with database.read() as session:
        named = set(retention.promised_blobs(session))
    return sorted(
        (tenant, digest) for tenant, digest in named if not BlobStore(settings.data_dir, tenant).has(digest)
    )


def read_manifest(folder: Path) -> Backup:
    """What a backup says of itself. Raises `BackupRefused` for a folder that is none, or half of one."""
    try:
        return Backup(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BackupRefused(
            f"A backup must be complete. Got {str(folder)!r} without {MANIFEST}, which is written last."
            " Take another one."
        ) from None
    except (ValueError, TypeError) as error:
        raise BackupRefused(f"{MANIFEST} must be what `bitplan backup` wrote. Got {error}.") from None


def _require_a_place(folder: Path) -> None:
    mine = {MANIFEST, SQLITE_FILE, POSTGRES_FILE, "blobs", *KEPT_FILES}
    mine |= {f".{name}" for name in mine}
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= mine):
        raise BackupRefused(
            f"A backup must go into a new folder or onto an earlier backup. Got {str(folder)!r}, which holds"
            " something else. Name another one."
        )


def _require_fitting(found: Backup, url: URL) -> None:
    if found.database != url.get_backend_name():
        raise BackupRefused(
            f"A backup must go back to its kind of database, {found.database}. Got {url.get_backend_name()}."
            " Correct BITPLAN_DATABASE_URL."
        )
    if found.schema_version not in migrate.known():
        raise migrate.DatabaseTooNew(found.schema_version, migrate.newest())


def _require_empty(settings: Settings, url: URL) -> None:
    there = next(_blobs_in(settings.data_dir), None) is not None
    if url.drivername == "sqlite":
        there = there or Path(str(url.database)).exists()
    else:
        there = there or migrate.current(settings.database_url) is not None
    if there:
        raise BackupRefused(
            "A backup must go into an empty data directory and an empty database. Got some with content."
            " Name others with BITPLAN_DATA_DIR and BITPLAN_DATABASE_URL, or move the old ones away."
        )


def _blobs_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted((folder / "blobs").glob("*/??/*")) if is_digest(path.name))


def _copy_blob(source: Path, target: Path) -> None:
    """Whole or absent, like the store's own."""
    make_folder(target.parent)
    growing = target.with_name(f".{target.name}")
    shutil.copyfile(source, growing)
    with growing.open("rb+") as file:
        sync_file(file)
    growing.replace(target)


def _restore_blob(data_dir: Path, path: Path) -> None:
    store = BlobStore(data_dir, path.parts[-3])
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != path.name:
            raise BackupError(
                f"A blob must have the digest that it is named by. Got {found} in {str(path)!r}. The backup"
                " is damaged: take the file from another one."
            )
        file.seek(0)
        store.put(iter(lambda: file.read(CHUNK_BYTES), b""), expected=path.name)


def _copy(source: Path, target: Path) -> None:
    """A small file or folder of them with its permissions, if it is there."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _write(path: Path, content: bytes) -> None:
    growing = path.with_name(f".{path.name}")
    with growing.open("wb") as file:
        file.write(content)
        sync_file(file)
    growing.replace(path)
    sync_folder(path.parent)


def _forget_runners(database: Database) -> None:
    """Those of the backup run elsewhere or no more; what they held is free when their leases end."""
    with database.write() as session:
        runners.forget(session, [runner.name for runner in runners.list_all(session)])


def _run_client(program: str, url: URL, *arguments: str) -> None:
    """Run a program of PostgreSQL; the password goes by the environment, where `ps` does not show it."""
    without = URL.create("postgresql", url.username, None, url.host, url.port, url.database, url.query)
    address = without.render_as_string(hide_password=False)
    secret: dict[str, Any] = {} if url.password is None else {"PGPASSWORD": str(url.password)}
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program, and arguments of our own
            [program, f"--dbname={address}", *arguments],
            env={**os.environ, **secret},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise BackupError(
            f"{program} must be installed to copy a PostgreSQL database. Got none on PATH. Install the"
            " client programs of the server's version."
        ) from None
    if done.returncode:
        raise BackupError(f"{program} must succeed. Got exit code {done.returncode}: {done.stderr.strip()}")
