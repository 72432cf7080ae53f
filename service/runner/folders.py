"""Folders that belong to one claim of a job, on the disk of the store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.db.repositories import jobs
from service.runner.context import JobContext


@contextmanager
def own_folder(context: JobContext, kind: str) -> Iterator[Path]:
    """A new folder of this claim; what claims left whose runners died is removed first."""
    temporary = context.settings.data_dir / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    prefix = f"{kind}-"
    for left in temporary.glob(f"{prefix}*"):
        if _is_left(context, left.name.removeprefix(prefix).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    folder = temporary / f"{prefix}{context.job.id}-{context.epoch}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_left(context: JobContext, job_id: str) -> bool:
    """Whether nobody writes into the folders of a job: it is this claim's own, has ended, or is gone."""
    job = context.read(lambda session: jobs.get(session, job_id))
    return job is None or job.finished or job.id == context.job.id
