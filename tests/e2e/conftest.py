"""The API and a runner as real processes, and tiny real models to send them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.processes import Service

ROOT = Path(__file__).parents[2]
POSTGRES = os.environ.get("BITPLAN_TEST_POSTGRES_URL")

Start = Callable[..., Service]


@pytest.fixture(scope="session")
def new_service(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Service]:
    """Make a service that is not started: new_service(variables, database_url)."""

    def make(variables: Mapping[str, str] | None = None, database_url: str = "") -> Service:
        folder = tmp_path_factory.mktemp("service")
        return Service(folder, database_url or f"sqlite:///{folder / 'bitplan.db'}", variables or {})

    return make


@pytest.fixture
def start(new_service: Callable[..., Service], request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start services that end with the test; their logs are shown when it fails."""
    services: list[Service] = []

    def begin(variables: Mapping[str, str] | None = None, database_url: str = "") -> Service:
        services.append(new_service(variables, database_url))
        return services[-1].start()

    yield begin
    for service in services:
        service.stop()
        show(service)


@pytest.fixture(scope="module")
def variables() -> Mapping[str, str]:
    """Environment variables of the module's service; a module may say otherwise."""
    return {}


@pytest.fixture(scope="module")
def service(new_service: Callable[..., Service], variables: Mapping[str, str]) -> Iterator[Service]:
    """One service for all tests of a module."""
    service = new_service(variables)
    try:
        yield service.start()
    finally:
        service.stop()
        show(service)


def show(service: Service) -> None:
    """pytest shows this only when the test failed."""
    for role in ("api", "runner"):
        lines = service.log(role).splitlines()
        print(f"--- {role}: the last of {len(lines)} lines", *lines[-60:], sep="\n")


@contextmanager
def empty_postgres() -> Iterator[str]:
    """A new PostgreSQL database without a schema, for as long as the block lasts."""
    if not POSTGRES:
        pytest.skip("BITPLAN_TEST_POSTGRES_URL is not set")
    name = f"bitplan_test_{uuid.uuid4().hex}"
    administer(f'CREATE DATABASE "{name}"')
    try:
        yield make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    finally:
        administer(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """An empty PostgreSQL database of this test alone, migrated by `bitplan migrate`."""
    with empty_postgres() as url:
        migrate = [sys.executable, "-m", "service.cli.main", "migrate", "--database-url", url]
        subprocess.run(migrate, check=True, capture_output=True, cwd=ROOT)
        yield url


def administer(statement: str) -> None:
    engine = create_engine(POSTGRES or "", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@dataclass(frozen=True)
class Input:
    """A model folder with calibration data."""

    folder: Path
    calibration: Path


@pytest.fixture(scope="session")
def resnet(tiny: Callable[[str], Any]) -> Input:
    """An image classifier with labeled calibration images as safetensors."""
    made = tiny("resnet")
    return Input(made.folder, made.data)


@pytest.fixture(scope="session")
def llama(tiny: Callable[[str], Any]) -> Input:
    """A causal language model with calibration text as jsonl."""
    made = tiny("llama")
    rows = made.folder / "rows.jsonl"
    texts = made.data.read_text(encoding="utf-8").splitlines()
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts), encoding="utf-8")
    return Input(made.folder, rows)
