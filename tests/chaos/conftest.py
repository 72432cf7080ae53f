"""One fork server and one undisturbed run for all tests of the matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import check
from tests.chaos.final import Final
from tests.chaos.harness import Chaotic, Run, Trouble, Undisturbed, deaths, fork_server, undisturbed_run
from tests.chaos.orders import LONGEST_LIFE_SECONDS, Orders
from tests.e2e.conftest import postgres_url  # noqa: F401
from tests.fork_server import ForkServer
from tests.ray_nodes import RayNodes
from tests.service.receiver import receiving


@dataclass(frozen=True)
class Endured:
    """What a run leaves to look at."""

    run: Run
    final: Final
    told: dict[str, Any]

    def answers(self) -> set[int]:
        """The statuses that clients got."""
        return {one.status for one in self.run.history.seen if one.status is not None}


Endure = Callable[..., Endured]
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


@pytest.fixture(scope="session")
def ray_variables(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Settings of runners whose workers are on two nodes of a Ray cluster, and die at their seventh unit."""
    dying = {"BITPLAN_FAILPOINTS": "worker.after_unit:7=kill"}
    with RayNodes(tmp_path_factory.mktemp("nodes"), [recording]) as nodes:
        nodes.add("one", **dying)
        nodes.add("two", **dying)
        yield {f"BITPLAN_{name.upper()}": value for name, value in nodes.settings.items()}


@pytest.fixture
def endure(forks: ForkServer, undisturbed: Undisturbed, tmp_path: Path) -> Endure:
    """endure(trouble, ...): clients use a service while `trouble(run)` lasts; no check may find anything."""

    def go(
        trouble: Trouble,
        *,
        seed: int = 1,
        url: str = "",
        folder: Path | None = None,
        variables: Mapping[str, str] | None = None,
        checkpoints: bool = False,
        server: ForkServer = forks,
    ) -> Endured:
        place = folder or tmp_path / f"seed {seed}"
        place.mkdir(exist_ok=True)
        chosen = {"BITPLAN_EXECUTOR": "in_process", **(variables or {})}
        service = Chaotic(place, url or f"sqlite:///{place / 'bitplan.db'}", chosen, server)
        with receiving() as receiver:
            run = Run(service, server, undisturbed, receiver, trouble, seed, checkpoints)
            try:
                final = run.go()
            finally:
                service.stop()
        found = check(run.history.seen, final)
        told = run.summary(found, final)
        print(json.dumps(told))
        assert not found, f"{place} holds the history; {found}"
        return Endured(run, final, told)

    return go


@pytest.fixture
def survive(endure: Endure) -> Survive:
    """survive(seed, kills, ...): the numbers of a run with so many kills by order of a seed."""

    def go(
        seed: int,
        kills: int,
        *,
        url: str = "",
        executor: str = "in_process",
        variables: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        checkpoints = executor == "in_process"
        without = frozenset[str]() if checkpoints else frozenset({"runner.checkpoint_stored"})
        longest_life = LONGEST_LIFE_SECONDS if executor != "ray" else 4 * LONGEST_LIFE_SECONDS
        orders = Orders(seed, executor == "local_pool", without, longest_life)
        return endure(
            deaths(orders, kills),
            seed=seed,
            url=url,
            variables={"BITPLAN_EXECUTOR": executor, **(variables or {})},
            checkpoints=checkpoints,
        ).told

    return go
