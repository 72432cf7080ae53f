"""Whether a runner of this host lives, as the health check of its container asks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from service.checks import runner_here
from service.db import migrate
from service.db.engine import Database
from service.db.repositories import runners
from service.db.tables import RunnerRow
from service.runner.identity import start_of, this_process
from service.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, database_url=f"sqlite:///{tmp_path}/bitplan.db")


def test_only_a_living_runner_of_this_host_that_told_so_counts(settings: Settings) -> None:
    migrate.upgrade(settings.database_url)
    database = Database(settings.database_url)
    me = this_process()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    gone = replace(me, name="gone", pid=ended.pid, process=start_of(ended.pid) or "none")
    ended.wait()
    with database.write() as session:
        runners.beat(session, gone, "1", "")
        runners.beat(session, replace(me, name="elsewhere", host="another"), "1", "")
    assert runner_here(settings).state == "failed"
    with database.write() as session:
        runners.beat(session, me, "1", "")
    assert runner_here(settings).state == "ok"
    with database.write() as session:
        row = session.get(RunnerRow, me.name)
        assert row is not None
        row.seen_at -= settings.lease_seconds + 1000
    found = runner_here(settings)
    assert found.state == "failed"
    assert found.detail.startswith("A runner must say within 60 s that it lives. Got one that last did 10")
    assert me.pid == os.getpid()
    database.close()


def test_without_a_schema_or_a_database_it_has_failed(settings: Settings, tmp_path: Path) -> None:
    assert runner_here(settings).detail == "OperationalError. Run `bitplan migrate`."
    away = Settings(data_dir=tmp_path, database_url="postgresql://u:hidden@127.0.0.1:1/d")
    found = runner_here(away)
    assert found.state == "failed"
    assert "hidden" not in found.detail
