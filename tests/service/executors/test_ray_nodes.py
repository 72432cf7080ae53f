"""What only a Ray cluster can do wrong: nodes, heads, actors and drivers die, bytes must travel, strangers knock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.digest import file_digest, folder_digest
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import ScoreUnit
from service.doctor import examine
from service.executors.protocol import ExecutorAway, ExecutorSettings, Failure, Outcome
from service.executors.ray_cluster import RayCluster, probe
from service.executors.ray_settings import RaySettings
from service.settings import Settings
from tests.ray_nodes import RayNodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FAKES = Path(__file__).parent
PATIENCE_SECONDS = 180
QUICK = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_health_check_timeout_ms": "3000"}
Make = Callable[..., RayCluster]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A head and two nodes with two CPUs each."""
    with RayNodes(tmp_path_factory.mktemp("nodes"), [FAKES], QUICK) as cluster:
        cluster.add("one")
        cluster.add("two")
        yield cluster


@pytest.fixture
def make(tmp_path: Path, nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.syspath_prepend(str(FAKES))
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    made: list[RayCluster] = []

    def start(spec: SessionSpec, factory: str, workers: int = 1, **more: Any) -> RayCluster:
        ray = RaySettings(nodes.address, token_file=str(nodes.token_file), **more)
        made.append(RayCluster(ExecutorSettings(workers, tmp_path / "logs", factory, ray=ray)))
        made[-1].start(spec)
        return made[-1]

    yield start
    for executor in made:
        executor.close(0)


def spec_of(folder: Path, tmp_path: Path) -> SessionSpec:
    """A model folder and a calibration file that are really there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(9_000_001))
    (folder / "notes.md").write_text("not part of the model")
    text = tmp_path / "words.txt"
    text.write_text(f"words of {folder}")
    return SessionSpec(
        ModelSource("folder", str(folder), folder_digest(folder)[0]),
        DataSource(str(text), "text", file_digest(text)),
    )


def score(layer: str) -> ScoreUnit:
    return ScoreUnit(layer, "w4", ("output_kl",))


def collect(executor: RayCluster, count: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(outcomes) < count:
        assert time.monotonic() < deadline, f"only {outcomes} came"
        outcomes += executor.wait(0.5)
    return outcomes


def ask(executor: RayCluster, deed: str) -> Any:
    executor.submit(deed, score(deed))
    (outcome,) = collect(executor, 1)
    return outcome.failure if outcome.result is None else outcome.result.facts["found"]


def told(found: object) -> str:
    assert isinstance(found, Failure), found
    return f"{found.kind}: {found.message}"


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_model_and_data_reach_each_node_once_and_the_worker_reads_nothing_else(
    make: Make, nodes: RayNodes, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path / "model", tmp_path)
    executor = make(spec, "curious_session:Seeing", workers=4)
    for index in range(24):
        executor.submit(str(index), score(f"pause:0.2:{index}"))
    found = [outcome.result.facts["found"] for outcome in collect(executor, 24) if outcome.result]
    assert len(found) == 24
    assert {seen["node"] for seen in found} == {"one", "two"}
    for seen in found:
        entry = nodes.cache(seen["node"]) / "entries" / spec.model.digest
        assert seen["model"] == str(entry)
        assert seen["files"] == {"config.json": 2, "model.safetensors": 9_000_001}
        assert seen["text"] == f"words of {tmp_path / 'model'}"
    for name in ("one", "two"):
        assert folder_digest(nodes.cache(name) / "entries" / spec.model.digest)[0] == spec.model.digest
        assert list((nodes.cache(name) / "coming").iterdir()) == []


def test_a_stranger_on_a_node_finds_no_token_and_no_other_model(
    make: Make, nodes: RayNodes, tmp_path: Path
) -> None:
    executor = make(spec_of(tmp_path / "model", tmp_path), "curious_session:CuriousSession")
    environment = ask(executor, "environment:")
    token = nodes.token_file.read_text()
    assert token not in " ".join(environment.values())
    assert not [name for name in environment if name.startswith(("RAY_", "BITPLAN_RAY"))]
    assert "Permission denied" in told(ask(executor, f"read:{nodes.token_file}"))
    node = environment["TMPDIR"].partition("/workers/")[0]
    other = Path(node) / "entries" / ("0" * 64)
    other.mkdir()
    (other / "data").write_text("another tenant's")
    assert "Permission denied" in told(ask(executor, f"read:{other / 'data'}"))
    other.joinpath("data").unlink()
    other.rmdir()
    assert "Permission denied" in told(ask(executor, "parent:"))
    assert "Permission denied" in told(ask(executor, f"write:{node}/entries/new"))
    listening = sorted(path for path in Path(node).parent.glob("*/session_2*/sockets/*") if path.is_socket())
    assert listening
    for path in listening:
        if Path(node).name.removeprefix("cache-") == path.parts[-4]:
            assert "No such file" in told(ask(executor, f"knock:{path}"))


def test_a_model_that_changed_since_is_refused_and_leaves_nothing(
    make: Make, nodes: RayNodes, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path / "model", tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"another")
    executor = make(spec, "curious_session:CuriousSession")
    failure = ask(executor, "environment:")
    assert told(failure).startswith(
        f"bad_input: What a node receives must have the digest {spec.model.digest}."
    )
    assert failure.detail["error"] == "model_changed"
    assert not any((nodes.cache(name) / "entries" / spec.model.digest).exists() for name in ("one", "two"))


def test_a_node_that_dies_costs_its_units_and_the_rest_goes_on_elsewhere(
    make: Make, nodes: RayNodes, tmp_path: Path
) -> None:
    nodes.add("third")
    executor = make(spec_of(tmp_path / "model", tmp_path), "curious_session:Seeing", workers=6)
    for index in range(12):
        executor.submit(str(index), score(f"pause:0.2:{index}"))
    seen: set[str] = set()
    counted = 0
    while counted < 12:
        for outcome in collect(executor, 1):
            counted += 1
            assert outcome.result is not None
            seen.add(outcome.result.facts["found"]["node"])
    for index in range(6):
        executor.submit(f"long{index}", score(f"pause:8:{index}"))
    time.sleep(3)
    nodes.kill("third")
    outcomes = collect(executor, 6)
    lost = [outcome for outcome in outcomes if outcome.failure is not None]
    assert {outcome.failure.kind for outcome in lost if outcome.failure} <= {"worker_crash"}
    assert "third" not in seen or lost
    for outcome in lost:
        executor.submit(outcome.key, score("pause:0:again"))
    again = collect(executor, len(lost))
    assert {outcome.result.facts["found"]["node"] for outcome in again if outcome.result} <= {"one", "two"}
    assert all(outcome.result is not None for outcome in again)


def test_an_actor_that_is_killed_costs_one_unit(make: Make, tmp_path: Path) -> None:
    executor = make(spec_of(tmp_path / "model", tmp_path), "curious_session:Seeing")
    first = ask(executor, "pause:0:a")
    executor.submit("long", score("pause:60:b"))
    time.sleep(2)
    os.kill(first["parent"], signal.SIGKILL)
    (outcome,) = collect(executor, 1)
    assert outcome.failure is not None
    assert told(outcome.failure).startswith("worker_crash: The worker's node must stay. Got Actor")
    until(lambda: gone(first["pid"]))
    assert ask(executor, "pause:0:c")["parent"] != first["parent"]


def test_a_driver_that_is_killed_takes_its_actors_along_and_is_replaced(make: Make, tmp_path: Path) -> None:
    executor = make(spec_of(tmp_path / "model", tmp_path), "curious_session:Seeing")
    first = ask(executor, "pause:0:a")
    executor.submit("long", score("pause:60:b"))
    time.sleep(2)
    assert executor.driver_pid is not None
    os.kill(executor.driver_pid, signal.SIGKILL)
    (outcome,) = collect(executor, 1)
    assert outcome.failure is not None
    assert "driver of the Ray cluster must live. Got its end (signal 9)" in told(outcome.failure)
    until(lambda: gone(first["pid"]) and gone(first["parent"]))
    assert ask(executor, "pause:0:c")["pid"] != first["pid"]


RUNNER = """
import json, sys, time
from pathlib import Path
from sensitivity.spec import SessionSpec
from sensitivity.units import ScoreUnit
from service.executors.protocol import ExecutorSettings
from service.executors.ray_cluster import RayCluster
from service.executors.ray_settings import RaySettings

given = json.loads(sys.argv[1])
ray = RaySettings.from_json(given["ray"])
executor = RayCluster(ExecutorSettings(1, Path(given["logs"]), "curious_session:Seeing", ray=ray))
executor.start(SessionSpec.from_json(given["spec"]))
executor.submit("a", ScoreUnit("pause:0:a", "w4", ("output_kl",)))
while not (outcomes := executor.wait(1)):
    pass
executor.submit("b", ScoreUnit("pause:600:b", "w4", ("output_kl",)))
found = outcomes[0].result.facts["found"]
print(json.dumps([found["pid"], found["parent"], executor.driver_pid]), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_actor_outlives_its_runner(nodes: RayNodes, tmp_path: Path, number: signal.Signals) -> None:
    ray = RaySettings(nodes.address, token_file=str(nodes.token_file)).as_json()
    spec = spec_of(tmp_path / "model", tmp_path).as_json()
    given = json.dumps({"ray": ray, "logs": str(tmp_path / "logs"), "spec": spec})
    paths = os.pathsep.join([str(FAKES.parents[2]), str(FAKES)])
    command = [sys.executable, "-c", RUNNER, given]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        pids = json.loads(next(line for line in runner.stdout if line.startswith(b"[")))
        runner.send_signal(number)
        runner.wait(30)
    until(lambda: all(gone(pid) for pid in pids))


def test_who_has_another_token_is_not_let_in(
    nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("0" * 64)
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "3")
    found = probe(RaySettings(nodes.address, token_file=str(tmp_path / "token")))
    assert "must let this runner in" in found["away"]
    assert "BITPLAN_RAY_TOKEN_FILE" in found["away"]
    assert "must let this runner in" in probe(RaySettings(nodes.address, auth="disabled"))["away"]


def test_doctor_asks_every_node(nodes: RayNodes, tmp_path: Path) -> None:
    checks = {
        check.name: check
        for check in examine(Settings(data_dir=tmp_path / "data", executor="ray", **nodes.settings))
    }
    assert checks["executor"].state == "ok"
    assert checks["ray"].state == "ok"
    assert "CPUs" in checks["ray"].detail
    node = next(check for name, check in checks.items() if name.startswith("node "))
    assert node.state in ("ok", "warning")
    assert "are free" in node.detail


def test_a_cluster_that_goes_away_costs_what_ran_and_then_the_job_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "cluster").mkdir()
    with RayNodes(tmp_path / "cluster", [FAKES], QUICK) as cluster:
        cluster.add("only")
        ray = RaySettings(cluster.address, token_file=str(cluster.token_file), patience_seconds=2)
        settings = ExecutorSettings(1, tmp_path / "logs", "curious_session:Seeing", ray=ray)
        executor = RayCluster(settings)
        executor.start(replace(spec_of(tmp_path / "model", tmp_path), seed=1))
        try:
            assert ask(executor, "pause:0:a")["node"] == "only"
            executor.submit("long", score("pause:600:b"))
            executor.submit("waits", score("pause:0:c"))
            time.sleep(2)
            cluster.kill("head")
            cluster.kill("only")
            (outcome,) = collect(executor, 1)
            assert outcome.key == "long"
            assert outcome.failure is not None
            assert outcome.failure.kind == "worker_crash"
            with pytest.raises(ExecutorAway, match="Ray"):
                collect(executor, 1)
        finally:
            executor.close(0)
