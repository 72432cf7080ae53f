import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.access import Scope, new_key
from service.db.engine import Database
from service.db.repositories import keys
from service.serve import BindRefused, require_safe_bind
from service.settings import Settings

ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from service.serve import serve
from service.settings import Settings
sys.exit(serve(Settings()))
"""
PATIENCE_SECONDS = 60


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machine_needs_no_key(host: str, tmp_path: Path) -> None:
    require_safe_bind(Settings(host=host, data_dir=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_beyond_this_machine_there_must_be_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", "", "*"):
        with pytest.raises(
            BindRefused, match="while there is no usable key.*bitplan keys create.*--insecure"
        ):
            require_safe_bind(Settings(host=host, data_dir=tmp_path))
    settings = Settings(host="0.0.0.0", data_dir=tmp_path)
    require_safe_bind(settings.model_copy(update={"access": "open"}))
    database, made = Database(settings.database_url), new_key()
    with database.write() as session:
        key = keys.create(
            session, tenant="a", name="", scope=Scope.READ, prefix=made.prefix, digest=made.digest
        )
    require_safe_bind(settings)
    with database.write() as session:
        keys.revoke(session, key.id)
    database.close()
    with pytest.raises(BindRefused):
        require_safe_bind(settings)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Settings(data_dir=tmp_path, database_url=f"sqlite:///{tmp_path}/bitplan.db", port=port, workers=1)


@pytest.fixture
def server(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    process = start(settings)
    yield process
    process.kill()
    process.wait()


def start(settings: Settings) -> "subprocess.Popen[bytes]":
    variables = {**os.environ, **settings.as_environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SERVE], env=variables)


def healthy(settings: Settings) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{settings.port}/healthz", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def children(pid: int) -> dict[str, int]:
    """The roles and process ids of a supervisor's children."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            except FileNotFoundError:
                continue
            if "service.serve" in words:
                found[words[words.index("service.serve") + 1]] = int(child)
    return found


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_command_serves_and_stops_cleanly(
    server: "subprocess.Popen[bytes]", settings: Settings, number: signal.Signals
) -> None:
    wait_for(lambda: healthy(settings))
    wait_for(lambda: set(children(server.pid)) == {"api", "runner"})
    pids = children(server.pid).values()
    server.send_signal(number)
    assert server.wait(PATIENCE_SECONDS) == 0
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow
def test_what_dies_is_started_again(server: "subprocess.Popen[bytes]", settings: Settings) -> None:
    wait_for(lambda: set(children(server.pid)) == {"api", "runner"})
    wait_for(lambda: healthy(settings))
    runner = children(server.pid)["runner"]
    os.kill(runner, signal.SIGKILL)
    wait_for(lambda: children(server.pid).get("runner", runner) != runner)
    assert healthy(settings)


@pytest.mark.slow
def test_children_stop_when_the_supervisor_is_killed(
    server: "subprocess.Popen[bytes]", settings: Settings
) -> None:
    wait_for(lambda: healthy(settings))
    wait_for(lambda: set(children(server.pid)) == {"api", "runner"})
    pids = children(server.pid).values()
    server.kill()
    server.wait()
    wait_for(lambda: all(gone(pid) for pid in pids))


@pytest.mark.slow
def test_a_port_that_is_taken_ends_the_command(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.port))
        taken.listen()
        process = start(settings)
        assert process.wait(PATIENCE_SECONDS) == 1
