"""One fork server and one undisturbed run for all tests of the matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import check
from tests.chaos.harness import Chaotic, Run, Undisturbed, fork_server, undisturbed_run
from tests.chaos.orders import Orders
from tests.e2e.conftest import postgres_url  # noqa: F401
from tests.fork_server import ForkServer
from tests.service.receiver import receiving

Survive = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recording")


@pytest.fixture(scope="session")
def forks(recording: Path) -> Iterator[ForkServer]:
    server = fork_server(recording)
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(
    recording: Path, forks: ForkServer, tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    return undisturbed_run(recording, tmp_path_factory.mktemp("undisturbed"), tiny("resnet").folder, forks)


@pytest.fixture
def survive(forks: ForkServer, undisturbed: Undisturbed, tmp_path: Path) -> Survive:
    """survive(seed, kills, ...): a run of the matrix that must leave no violation; its numbers."""

    def go(
        seed: int, kills: int, *, url: str = "", executor: str = "in_process", checkpoints: bool = False
    ) -> dict[str, Any]:
        folder = tmp_path / f"seed {seed}"
        workers = executor != "in_process"
        without = frozenset() if checkpoints else frozenset({"runner.checkpoint_stored"})
        variables = {"BITPLAN_EXECUTOR": executor}
        service = Chaotic(folder, url or f"sqlite:///{folder / 'bitplan.db'}", variables, forks)
        with receiving() as receiver:
            orders = Orders(seed, workers, without)
            run = Run(service, forks, undisturbed, receiver, orders, kills, checkpoints)
            try:
                final = run.go()
            finally:
                service.stop()
        found = check(run.history.seen, final)
        told = run.summary(found, final)
        print(json.dumps(told))
        assert not found, f"{folder} holds the history; {found}"
        return told

    return go
