"""What is kept and for how long: old jobs go, and then the files that nothing refers to any more.

A file goes when no row names it, when nobody has added it for `unreferenced_hours`, and when both still hold
under the locks of `service.db.repositories.retention` and `service.store.lock`. Its row goes first: a crash
in between leaves a file without a row, which the next collection finds.
"""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.db.repositories import audit, jobs, retention, runners
from service.db.repositories.retention import Blob
from service.runner.identity import start_of
from service.settings import Settings
from service.store import sweep
from service.store.sweep import Old

BATCH = 200
AUDIT_BATCH = 2000
FORGET_RUNNERS_SECONDS = 24 * 3600.0
"""A runner that died without a word is shown for a day."""

log = structlog.get_logger()
Key = TypeVar("Key", str, Blob)
T = TypeVar("T")


@dataclass(frozen=True)
class Collected:
    """How many things of one kind went, and the bytes of their files."""

    what: str
    count: int
    bytes: int = 0


def collect(
    settings: Settings, database: Database, *, dry_run: bool = False, stopping: Callable[[], bool] = bool
) -> tuple[Collected, ...] | None:
    """Delete what may go; with `dry_run` only say what would. None while another process collects.

    `stopping` is asked between steps; what is left then is left for the next time.
    """
    with _only_one(settings.data_dir) as mine:
        if not mine:
            return None
        return _Collection(settings, database, dry_run=dry_run, stopping=stopping).run()


@contextmanager
def _only_one(data_dir: Path) -> Iterator[bool]:
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "gc.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class _Collection:
    """One pass. In a dry run, what would have gone by now is left out of what is asked next."""

    def __init__(
        self, settings: Settings, database: Database, *, dry_run: bool, stopping: Callable[[], bool]
    ) -> None:
        self._settings, self._database, self._dry, self._stopping = settings, database, dry_run, stopping
        self._now = datetime.now(UTC)
        self._clock = sweep.clock(settings.data_dir)
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._jobs: frozenset[str] = frozenset()
        self._sets: frozenset[str] = frozenset()
        self._uploads: frozenset[str] = frozenset()

    def run(self) -> tuple[Collected, ...]:
        """In the order in which one thing lets go of the next."""
        for what, step in (
            ("jobs", self._expire_jobs),
            ("score sets", self._drop_score_sets),
            ("uploads", self._drop_uploads),
            ("complete uploads", self._drop_complete_uploads),
            ("deleted models", partial(self._drop_tombstones, "model")),
            ("deleted calibration sets", partial(self._drop_tombstones, "calibration")),
            ("audit rows", self._drop_audit),
            ("idempotency keys", self._drop_keys),
            ("runners", self._forget_runners),
            ("folders of models", self._drop_views),
            ("blobs", self._drop_blobs),
            ("partial uploads", self._drop_partials),
            ("logs", self._drop_logs),
            ("temporary files", self._drop_temporaries),
        ):
            self._counts[what] += 0
            if not self._stopping():
                step(what)
        found = tuple(Collected(what, count, self._bytes[what]) for what, count in self._counts.items())
        log.info(
            "gc.collected",
            dry_run=self._dry,
            bytes=sum(item.bytes for item in found),
            **{item.what.replace(" ", "_"): item.count for item in found if item.count},
        )
        return found

    def _expire_jobs(self, what: str) -> None:
        if not self._settings.keep_jobs_days:
            return
        before = self._days_ago(self._settings.keep_jobs_days)
        found = self._read(lambda session: retention.expired_jobs(session, before))
        self._jobs = self._delete(found, lambda session, some: retention.delete_jobs(session, before, some))
        self._counts[what] += len(self._jobs)

    def _drop_score_sets(self, what: str) -> None:
        before, left_out = self._grace, self._jobs
        found = self._read(lambda session: retention.idle_score_sets(session, before, left_out))
        self._sets = self._delete(
            found, lambda session, some: retention.delete_score_sets(session, before, some), 1
        )
        self._counts[what] += len(self._sets)

    def _drop_uploads(self, what: str) -> None:
        before = self._days_ago(self._settings.keep_uploads_days)
        still = {old.name for old in sweep.old_partials(self._settings.data_dir, before.timestamp())}
        found = self._read(lambda session: retention.old_uploads(session, before))
        idle = {
            ident
            for tenant, ident in found
            if ident in still or not (self._settings.data_dir / "partials" / tenant / ident).exists()
        }
        self._uploads = self._delete(
            idle, lambda session, some: retention.delete_uploads(session, before, some)
        )
        self._counts[what] += len(self._uploads)

    def _drop_complete_uploads(self, what: str) -> None:
        if not self._settings.keep_done_days:
            return
        before = self._days_ago(self._settings.keep_done_days)
        found = self._read(lambda session: retention.complete_uploads(session, before))
        self._counts[what] += len(self._delete(found, retention.delete_complete_uploads))

    def _drop_tombstones(self, kind: retention.Inputs, what: str) -> None:
        if not self._settings.keep_done_days:
            return
        before, left_out = self._days_ago(self._settings.keep_done_days), self._jobs
        found = self._read(lambda session: retention.tombstones(session, kind, before, left_out))
        gone = self._delete(
            found, lambda session, some: retention.delete_tombstones(session, kind, before, some)
        )
        self._counts[what] += len(gone)

    def _drop_audit(self, what: str) -> None:
        if not self._settings.keep_audit_days:
            return
        before = self._days_ago(self._settings.keep_audit_days)
        if self._dry:
            self._counts[what] += self._read(lambda session: audit.count_before(session, before))
            return
        while not self._stopping():
            with self._database.write() as session:
                gone = audit.delete_before(session, before, AUDIT_BATCH)
            self._counts[what] += gone
            if gone < AUDIT_BATCH:
                return

    def _drop_keys(self, what: str) -> None:
        before = self._days_ago(self._settings.keep_keys_days)
        if self._dry:
            self._counts[what] += self._read(lambda session: retention.old_keys(session, before))
            return
        with self._database.write() as session:
            self._counts[what] += retention.delete_keys(session, before)

    def _forget_runners(self, what: str) -> None:
        gone = [
            runner.name
            for runner in self._read(runners.list_all)
            if runner.seconds_ago > FORGET_RUNNERS_SECONDS
        ]
        self._counts[what] += len(gone)
        if gone and not self._dry:
            with self._database.write() as session:
                runners.forget(session, gone)

    def _drop_views(self, what: str) -> None:
        data_dir, before = self._settings.data_dir, self._old_before
        old = tuple(sweep.old_views(data_dir, before))
        kept = self._read(retention.kept_models)
        gone = [view for view in old if (view.tenant, view.name) not in kept]
        self._remove(what, gone, lambda view: sweep.remove_view(data_dir, view.path, before))

    def _drop_blobs(self, what: str) -> None:
        data_dir, before = self._settings.data_dir, self._old_before
        files = {(old.tenant, old.name): old for old in sweep.old_blobs(data_dir, before)}
        rows = self._read(lambda session: retention.old_blobs(session, self._grace))
        asked = sorted({*files, *rows})
        needed = self._read(
            lambda session: retention.needed_blobs(
                session,
                asked,
                without_jobs=self._jobs,
                without_sets=self._sets,
                without_uploads=self._uploads,
            )
        )
        gone = self._delete([blob for blob in asked if blob not in needed], retention.delete_blobs)
        left = [files[blob] for blob in sorted(gone) if blob in files]
        self._counts[what] += len(gone - files.keys())
        self._remove(what, left, lambda old: sweep.remove_blob(data_dir, old.path, before))

    def _drop_partials(self, what: str) -> None:
        before = self._clock - self._settings.keep_uploads_days * 86400
        old = sweep.old_partials(self._settings.data_dir, before)
        self._remove(what, old, lambda partial: sweep.remove_partial(partial.path, before))

    def _drop_logs(self, what: str) -> None:
        before = self._clock - self._settings.keep_logs_days * 86400
        old = sweep.old_logs(self._settings.data_dir, before)
        self._remove(
            what, [item for item in old if not _is_written(item.name)], lambda item: sweep.remove(item.path)
        )

    def _drop_temporaries(self, what: str) -> None:
        old = tuple(sweep.old_temporaries(self._settings.data_dir, self._old_before))
        self._remove(
            what, [item for item in old if not self._is_held(item.name)], lambda item: sweep.remove(item.path)
        )

    def _is_held(self, name: str) -> bool:
        """Whether the job whose folder this is still runs."""
        _, _, ident = name.partition("-")
        job = self._read(lambda session: jobs.get(session, ident.partition("-")[0]))
        return job is not None and not job.finished

    def _delete(
        self,
        found: Collection[Key],
        delete: Callable[[Session, Collection[Key]], frozenset[Key]],
        batch: int = BATCH,
    ) -> frozenset[Key]:
        """Those of `found` that went, some per transaction, so that others can write in between."""
        if self._dry:
            return frozenset(found)
        asked: list[Key] = sorted(found)
        gone: set[Key] = set()
        for start in range(0, len(asked), batch):
            if self._stopping():
                break
            with self._database.write() as session:
                gone |= delete(session, asked[start : start + batch])
        return frozenset(gone)

    def _remove(self, what: str, found: Iterable[Old], remove: Callable[[Old], bool]) -> None:
        for old in found:
            if self._stopping():
                return
            if self._dry or remove(old):
                self._counts[what] += 1
                self._bytes[what] += old.size

    def _read(self, query: Callable[[Session], T]) -> T:
        with self._database.read() as session:
            return query(session)

    def _days_ago(self, days: float) -> datetime:
        return self._now - timedelta(days=days)

    @property
    def _grace(self) -> datetime:
        return self._now - timedelta(hours=self._settings.unreferenced_hours)

    @property
    def _old_before(self) -> float:
        return self._clock - self._settings.unreferenced_hours * 3600


def _is_written(name: str) -> bool:
    """Whether a process of this host that may hold the log ``worker-PID-SLOT`` lives."""
    pid = name.split("-")[1]
    return pid.isdigit() and start_of(int(pid)) is not None
