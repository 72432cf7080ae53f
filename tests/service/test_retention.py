"""What goes and what stays: jobs, score sets, uploads, and the files that nothing refers to."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from sqlalchemy import update

from service.access import Access
from service.db.engine import Database
from service.db.repositories import (
    audit,
    calibrations,
    idempotency,
    jobs,
    leases,
    models,
    plans,
    retention,
    score_sets,
    units,
    uploads,
)
from service.db.repositories.leases import Owner
from service.db.tables import (
    AuditRow,
    BlobRow,
    CalibrationRow,
    IdempotencyKeyRow,
    JobRow,
    ModelRow,
    PlanRow,
    ScoreSetRow,
    UploadRow,
)
from service.retention import collect
from service.settings import Settings
from service.states import InputState, JobKind, JobState
from service.store import sweep
from service.store.blobs import BlobStore
from service.store.lock import alone, shared

DAY = 86400.0
TABLES = (
    *(AuditRow, BlobRow, CalibrationRow, IdempotencyKeyRow, JobRow),
    *(ModelRow, PlanRow, ScoreSetRow, UploadRow),
)
Collect = Callable[..., dict[str, int]]


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=database_url, keep_jobs_days=30)


@pytest.fixture
def store(settings: Settings) -> BlobStore:
    return BlobStore(settings.data_dir)


@pytest.fixture
def run(settings: Settings, database: Database) -> Collect:
    def counts(**options: Any) -> dict[str, int]:
        found = collect(settings, database, **options)
        assert found is not None
        return {item.what: item.count for item in found if item.count}

    return counts


def age(database: Database, settings: Settings, days: float = 100) -> None:
    """Everything becomes older, files and rows."""
    then = time.time() - days * DAY
    for path in sorted(settings.data_dir.rglob("*"), reverse=True):
        os.utime(path, (then, then))
    at = datetime.now(UTC) - timedelta(days=days)
    with database.write() as session:
        for table in TABLES:
            session.execute(update(table).values(created_at=at))
        session.execute(update(JobRow).where(JobRow.finished_at.is_not(None)).values(finished_at=at))


def finished(database: Database, kind: JobKind = JobKind.SEARCH, **facts: Any) -> str:
    request = facts.pop("request", {})
    with database.write() as session:
        job = jobs.create(session, kind=kind, request=request, request_digest="d")
        held = leases.claim_job(session, job.id, Owner("o", "h", 1, "p"), 60)
        assert held is not None
        leases.finish(session, job.id, held.epoch, JobState.SUCCEEDED, **facts)
    return job.id


def plan_of(database: Database, job_id: str) -> str:
    with database.write() as session:
        return plans.insert(
            session,
            job_id=job_id,
            budget="4 bpw",
            settings_digest="s",
            status="optimal",
            digest="d",
            document={},
            result={},
        ).id


def ids(database: Database) -> set[str]:
    with database.read() as session:
        return {job.id for job in jobs.list_page(session)}


def test_the_files_of_a_deleted_model_go_with_their_rows_and_folder(
    database: Database, settings: Settings, store: BlobStore, run: Collect
) -> None:
    blob, other = store.put_bytes(b"weights"), store.put_bytes(b"another model's")
    with database.write() as session:
        made = []
        for digest, name in ((blob, "a" * 64), (other, "b" * 64)):
            uploads.record_blob(session, digest, 7)
            source = {"kind": "upload", "files": [{"path": "w.safetensors", "sha256": digest, "size": 7}]}
            made.append(models.create(session, source=source, digest=name).id)
    for digest, name in ((blob, "a" * 64), (other, "b" * 64)):
        store.materialize([("w.safetensors", digest)], name)
    age(database, settings)
    assert run() == {}
    with database.write() as session:
        models.set_state(session, made[0], InputState.DELETED)
    assert run(dry_run=True) == {"folders of models": 1, "blobs": 1, "deleted models": 1}
    assert store.has(blob)
    assert run() == {"folders of models": 1, "blobs": 1, "deleted models": 1}
    assert (store.has(blob), store.has(other)) == (False, True)
    assert [path.name for path in (settings.data_dir / "views" / "default").iterdir()] == ["b" * 64]
    with database.read() as session:
        assert uploads.known_blobs(session, [blob, other]) == {other}
    assert run() == {}


def test_what_is_young_stays_although_nothing_names_it(
    database: Database, settings: Settings, store: BlobStore, run: Collect
) -> None:
    blob = store.put_bytes(b"an upload that is not recorded yet")
    assert run() == {}
    age(database, settings)
    assert store.put_bytes(b"an upload that is not recorded yet") == blob
    assert run() == {}
    age(database, settings, days=0.9)
    assert run() == {}
    age(database, settings, days=1.1)
    assert run() == {"blobs": 1}


def test_a_blob_that_is_added_again_while_it_is_collected_stays(
    database: Database, settings: Settings, store: BlobStore, run: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = store.put_bytes(b"again")
    age(database, settings)
    remove = sweep.remove_blob

    def added_just_before(data_dir: Path, path: Path, before: float) -> bool:
        store.put_bytes(b"again")
        return remove(data_dir, path, before)

    monkeypatch.setattr(sweep, "remove_blob", added_just_before)
    assert run() == {}
    assert store.has(blob)


def test_a_row_that_is_made_while_blobs_are_collected_keeps_its_blob(
    database: Database, settings: Settings, store: BlobStore, run: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = store.put_bytes(b"weights")
    with database.write() as session:
        uploads.record_blob(session, blob, 7)
    age(database, settings)
    delete = retention.delete_blobs

    def referred_to_just_before(session: Any, blobs: Any) -> Any:
        manifest = [{"path": "w", "sha256": blob, "size": 7}]
        uploads.create(session, purpose="model", manifest=manifest)
        return delete(session, blobs)

    monkeypatch.setattr(retention, "delete_blobs", referred_to_just_before)
    assert run() == {}
    assert store.has(blob)


def test_nothing_is_removed_while_a_backup_copies(
    database: Database, settings: Settings, store: BlobStore, run: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "PATIENCE_SECONDS", 0.0)
    blob = store.put_bytes(b"x")
    age(database, settings)
    with shared(store.lock):
        assert run() == {}
        store.remove(blob)
        assert store.has(blob)
    assert run() == {"blobs": 1}
    with alone(store.lock, 0) as mine, alone(store.lock, 0) as second:
        assert (mine, second) == (True, False)


def test_only_jobs_that_nobody_uses_expire(database: Database, settings: Settings, run: Collect) -> None:
    old, asked, measured = (finished(database) for _ in range(3))
    plan_of(database, old)
    about = {"plan": plan_of(database, measured), "job": measured}
    with database.write() as session:
        waiting = jobs.create(session, kind=JobKind.MEASURE_PLAN, request=about, request_digest="m").id
        running = jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="r").id
        leases.claim_job(session, running, Owner("o", "h", 1, "p"), 60)
    age(database, settings)
    recent = finished(database)
    plan_of(database, asked)
    assert run(dry_run=True) == {"jobs": 1}
    assert run() == {"jobs": 1}
    assert ids(database) == {asked, measured, waiting, running, recent}


def test_jobs_are_kept_for_ever_unless_told(database: Database, settings: Settings) -> None:
    job = finished(database)
    age(database, settings, days=10000)
    forever = settings.model_copy(update={"keep_jobs_days": 0.0})
    assert collect(forever, database) is not None
    assert ids(database) == {job}


@pytest.mark.parametrize("dry_run", [False, True])
def test_scores_go_when_neither_a_job_nor_their_model_is_left(
    database: Database, settings: Settings, store: BlobStore, run: Collect, dry_run: bool
) -> None:
    artifacts = [store.put_arrays({"x": np.arange(size)}) for size in (3, 4, 5)]
    job = finished(database)
    with database.write() as session:
        models.create(session, source={"kind": "local", "folder": "/m"}, digest="kept")
        for name, model, artifact in zip("abc", ("gone", "kept", "gone too"), artifacts, strict=True):
            score_sets.ensure(session, name, {"model": model})
            units.insert(
                session,
                score_set=name,
                key="k",
                kind="score",
                unit={},
                facts={},
                artifact=artifact,
                job_id=None,
            )
        units.add_fault(session, score_set="c", unit_key="k", kept={"artifact": None}, got={})
        session.get_one(JobRow, job).score_set = "a"
    recent = settings.model_copy(update={"keep_jobs_days": 1000.0})
    age(database, settings)
    found = {item.what: item.count for item in collect(recent, database, dry_run=dry_run) or () if item.count}
    assert found == {"score sets": 1, "blobs": 1}
    everything = (
        {"jobs": 1, "score sets": 2, "blobs": 2} if dry_run else {"jobs": 1, "score sets": 1, "blobs": 1}
    )
    assert run(dry_run=dry_run) == everything
    assert [store.has(artifact) for artifact in artifacts] == (
        [True] * 3 if dry_run else [False, True, False]
    )


def test_uploads_that_stand_still_go_and_those_that_move_stay(
    database: Database, settings: Settings, store: BlobStore, run: Collect
) -> None:
    def opened(content: str) -> Any:
        digest = content * 64
        with database.write() as session:
            upload = uploads.create(
                session, purpose="model", manifest=[{"path": "w", "sha256": digest, "size": 9}]
            )
        with store.partial(upload.id, digest).append(0, 9) as writer:
            writer.write(b"begun")
        return upload.id, store.partial(upload.id, digest)

    (still, left), (moving, partial) = opened("a"), opened("b")
    age(database, settings)
    with partial.append(5, 9) as writer:
        writer.write(b"on")
    assert run(dry_run=True) == {"uploads": 1, "partial uploads": 1}
    with left.append(5, 9):
        assert run() == {"uploads": 1}
    age(database, settings, days=5)
    assert (left.offset, partial.offset) == (5, 7)
    os.utime(settings.data_dir / "partials" / "default" / still / ("a" * 64), (0, 0))
    os.utime(settings.data_dir / "partials" / "default" / still, (0, 0))
    assert run() == {"partial uploads": 1}
    assert (left.offset, partial.offset) == (0, 7)
    with database.read() as session:
        assert uploads.get(session, still) is None
        assert uploads.get(session, moving) is not None


def test_an_upload_keeps_the_blobs_that_it_found_there(
    database: Database, settings: Settings, store: BlobStore, run: Collect
) -> None:
    blob = store.put_bytes(b"weights")
    with database.write() as session:
        uploads.record_blob(session, blob, 7)
    age(database, settings)
    with database.write() as session:
        uploads.create(session, purpose="model", manifest=[{"path": "w", "sha256": blob, "size": 7}])
    assert run() == {}
    assert store.has(blob)


def test_calibration_files_and_checkpoints_stay_with_what_names_them(
    database: Database, settings: Settings, store: BlobStore, run: Collect
) -> None:
    text, weights = store.put_bytes(b"text"), store.put_bytes(b"packed")
    with database.write() as session:
        source = {"kind": "local", "files": [{"path": "c.txt", "sha256": text}]}
        calibration = calibrations.create(session, source=source, digest=text, kind="text")
    factor = store.put_arrays({"factor": np.ones(2)})
    job = finished(database, JobKind.WRITE_CHECKPOINT, summary={"sha256": weights})
    search = finished(database, summary={"interactions": {"metric": "gram_output", "factor": factor}})
    age(database, settings, days=20)
    assert run() == {}
    with database.read() as session:
        assert {digest for _, digest in retention.promised_blobs(session)} == {text, weights, factor}
    with database.write() as session:
        calibrations.set_state(session, calibration.id, InputState.DELETED)
        jobs.delete(session, job)
        jobs.delete(session, search)
    assert run() == {"blobs": 3}
    assert not store.has(text)


def test_old_logs_leftovers_and_keys_go(database: Database, settings: Settings, run: Collect) -> None:
    with database.write() as session:
        assert idempotency.begin(session, "k", "d") is None
        running = jobs.create(session, kind=JobKind.WRITE_CHECKPOINT, request={}, request_digest="r").id
    logs, temporary = settings.data_dir / "logs", settings.data_dir / "tmp"
    for folder in (logs, temporary / "checkpoint-job_1-1", temporary / f"checkpoint-{running}-1"):
        folder.mkdir(parents=True)
    (logs / "worker-999999999-0.log").write_text("old")
    (logs / f"worker-{os.getpid()}-0.log").write_text("of a runner that lives")
    (temporary / "checkpoint-job_1-1" / "result").write_text("half")
    (temporary / "abc").write_text("left by a crash")
    age(database, settings)
    assert run() == {"idempotency keys": 1, "logs": 1, "temporary files": 2}
    assert [path.name for path in logs.iterdir()] == [f"worker-{os.getpid()}-0.log"]
    assert [path.name for path in temporary.iterdir()] == [f"checkpoint-{running}-1"]


def test_one_process_collects_at_a_time(database: Database, settings: Settings) -> None:
    seen: list[object] = []

    def asks_again() -> bool:
        seen.append(collect(settings, database, dry_run=True))
        return True

    assert collect(settings, database, stopping=asks_again) is not None
    assert set(seen) == {None}


def inputs(database: Database) -> tuple[str, str]:
    """A deleted model and a deleted calibration set."""
    with database.write() as session:
        model = models.create(session, source={"kind": "upload", "files": []}, digest="c" * 64)
        data = calibrations.create(
            session, source={"files": []}, digest="d" * 64, kind="text", state=InputState.READY
        )
        models.set_state(session, model.id, InputState.DELETED)
        calibrations.set_state(session, data.id, InputState.DELETED)
    return model.id, data.id


def test_complete_uploads_and_deleted_inputs_are_forgotten(
    database: Database, settings: Settings, run: Collect
) -> None:
    with database.write() as session:
        done = uploads.create(session, purpose="model", manifest=[])
        uploads.complete(session, done.id)
        kept = models.create(session, source={"kind": "upload", "files": []}, digest="e" * 64)
    model, data = inputs(database)
    assert run() == {}
    age(database, settings)
    expected = {"complete uploads": 1, "deleted models": 1, "deleted calibration sets": 1}
    assert run(dry_run=True) == expected
    never = collect(settings.model_copy(update={"keep_done_days": 0.0}), database)
    assert never is not None
    assert sum(item.count for item in never) == 0
    assert run() == expected
    with database.read() as session:
        assert uploads.get(session, done.id) is None
        assert models.get(session, model) is None
        assert calibrations.get(session, data) is None
        assert models.get(session, kept.id) is not None


def test_deleted_inputs_stay_as_long_as_a_job_is_about_them(
    database: Database, settings: Settings, run: Collect
) -> None:
    (first, data), (second, other), (third, _) = inputs(database), inputs(database), inputs(database)
    finished(database, request={"model": first, "calibration": data})
    finished(database, JobKind.CORRELATE, request={"search": {"model": second, "calibration": other}})
    finished(database, JobKind.VERIFY_MODEL, request={"model": third})
    age(database, settings, days=29)
    assert run() == {}
    age(database, settings, days=29.9)
    forever = settings.model_copy(update={"keep_jobs_days": 0.0, "keep_done_days": 20.0})
    found = collect(forever, database)
    assert found is not None
    assert {item.what: item.count for item in found if item.count} == {
        "deleted models": 1,
        "deleted calibration sets": 1,
    }
    age(database, settings)
    assert run(dry_run=True) == run()
    with database.read() as session:
        assert [models.get(session, ident) for ident in (first, second, third)] == [None] * 3


def test_the_audit_log_is_cut_where_the_operator_says_so(database: Database, settings: Settings) -> None:
    def write() -> None:
        with database.write() as session:
            for _ in range(5):
                audit.begin(
                    session,
                    Access(),
                    action="x",
                    method="POST",
                    path="/",
                    peer=None,
                    request_id="r",
                    status=201,
                )

    def cut(days: float, **options: Any) -> int:
        found = collect(settings.model_copy(update={"keep_audit_days": days}), database, **options)
        assert found is not None
        return next(item.count for item in found if item.what == "audit rows")

    write()
    age(database, settings)
    write()
    assert cut(0.0) == 0
    assert cut(365.0) == 0
    assert cut(50.0, dry_run=True) == 5
    with patch("service.retention.AUDIT_BATCH", 2):
        assert cut(50.0) == 5
    with database.read() as session:
        assert len(audit.newest(session, 100)) == 5


PUBLISHERS = {
    "api/intake.py": "models that are copied from folders",
    "backup.py": "whatever a backup holds",
    "hub/fetching.py": "models of a hub, from the list on; those of this machine at their end",
    "interactions.py": "the summary of a search, at its end",
    "local.py": "calibration sets of this machine",
    "runner/calibration_job.py": "calibration sets that were made",
    "runner/checkpoint_job.py": "the summary of a checkpoint job",
    "runner/dispatch.py": "artifacts of units",
    "runner/lab.py": "artifacts of units",
}
"""Who adds blobs beside uploads, and the row that names them, within `unreferenced_hours`."""


def test_retention_knows_everybody_who_adds_blobs() -> None:
    service = Path(__file__).parents[2] / "service"
    adds = re.compile(r"store\.(put|put_bytes|put_file|put_arrays|adopt)\(")
    found = {
        str(path.relative_to(service))
        for path in service.rglob("*.py")
        if path.parent.name != "store" and adds.search(path.read_text("utf-8"))
    }
    assert found == set(PUBLISHERS), "Teach service/db/repositories/retention.py which row names the blob."


@pytest.mark.postgres
@pytest.mark.parametrize("empty_database_url", ["postgres"], indirect=True)
def test_deletions_wait_for_those_who_refer(database: Database) -> None:
    """On PostgreSQL two transactions write at a time; the retention lock orders them."""
    import threading

    ended = threading.Event()

    def delete() -> None:
        with database.write() as session:
            retention.delete_blobs(session, [("default", "a" * 64)])
        ended.set()

    with database.write() as session:
        retention.share(session)
        thread = threading.Thread(target=delete)
        thread.start()
        assert not ended.wait(0.3)
    thread.join(30)
    assert ended.is_set()
