"""The command in this process, with one data directory per run of the tests and workers in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

FEW = ("--samples", "8", "--evaluations", "2", "--schemes", "w2,w4,w8")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores that one test measures serve the others."""
    return tmp_path_factory.mktemp("bitplan")


@pytest.fixture
def quick(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the environment under which a search takes a second."""
    monkeypatch.delenv("BITPLAN_DATABASE_URL", raising=False)
    monkeypatch.setenv("BITPLAN_DATA_DIR", str(data_dir))
    monkeypatch.setenv("BITPLAN_EXECUTOR", "in_process")
    monkeypatch.setenv("BITPLAN_WORKERS", "1")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def bitplan(quick: None) -> Callable[..., Result]:
    """bitplan("run", folder, ...): the result of the command; an unexpected exception is raised."""
    from service.cli.main import app

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return invoke


@pytest.fixture
def answer(bitplan: Callable[..., Result]) -> Callable[..., Any]:
    """answer("run", ...): what the command prints with --json, which must be JSON and nothing else."""

    def ask(*arguments: object, code: int = 0) -> Any:
        result = bitplan(*arguments, "--json")
        assert result.exit_code == code, result.stderr
        return json.loads(result.stdout)

    return ask


@pytest.fixture
def few() -> tuple[str, ...]:
    """Options of a small search."""
    return FEW


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service in threads of this process: the API, and a runner that measures."""
    import uvicorn

    from service.app import create_app
    from service.db import migrate
    from service.db.engine import Database
    from service.runner.catalog import load_handlers
    from service.runner.loop import Runner
    from service.settings import Settings

    folder = tmp_path_factory.mktemp("server")
    settings = Settings(
        data_dir=folder,
        database_url=f"sqlite:///{folder}/bitplan.db",
        executor="in_process",
        workers=1,
        poll_seconds=0.05,
    )
    migrate.upgrade(settings.database_url)
    database = Database(settings.database_url)
    runner = Runner(settings, database, load_handlers())
    api = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="warning"))
    threads = [threading.Thread(target=target, daemon=True) for target in (api.run, runner.run)]
    for thread in threads:
        thread.start()
    while not api.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{api.servers[0].sockets[0].getsockname()[1]}"
    api.should_exit = True
    runner.stop()
    for thread in threads:
        thread.join(30)
    database.close()
