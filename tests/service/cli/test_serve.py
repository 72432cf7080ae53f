"""`bitplan migrate` and `bitplan runner`; `bitplan serve` as a process is in tests/service/test_serve.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from service.db import migrate

ROOT = Path(__file__).parents[3]


def test_migrate_brings_a_new_database_up(bitplan: Callable[..., Result], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    result = bitplan("migrate", "--data-dir", tmp_path / "data", "--database-url", url, "--json")
    assert json.loads(result.stdout) == {"schema_version": migrate.newest()}
    assert migrate.current(url) == migrate.newest()
    assert (
        "at schema version"
        in bitplan("migrate", "--data-dir", tmp_path / "data", "--database-url", url).stdout
    )


def test_migrate_refuses_what_is_no_database(bitplan: Callable[..., Result], tmp_path: Path) -> None:
    result = bitplan("migrate", "--data-dir", tmp_path, "--database-url", "mysql://host/name")
    assert result.exit_code == 2
    assert "PostgreSQL" in result.stderr


def test_a_runner_alone_starts_and_stops_cleanly(bitplan: Callable[..., Result], tmp_path: Path) -> None:
    check = ("runner", "--check", "--data-dir", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli.main", "runner", "--data-dir", str(tmp_path), "--workers", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        assert "runner.started" in process.stderr.readline()
        told = bitplan(*check)
        assert (told.exit_code, told.stdout[:14]) == (0, "1 on this host")
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0
    assert "runner.stopped" in rest
    assert (tmp_path / "bitplan.db").exists()
    told = bitplan(*check)
    assert (told.exit_code, told.stderr) == (
        1,
        "bitplan: A runner must live on this host. Got none. Start `bitplan runner`.\n",
    )
