"""The runner's side of the executor "ray", without a cluster."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import ScoreUnit
from service.executors import ray_cluster, ray_settings
from service.executors.catalog import make_executor, require_usable
from service.executors.confine import Isolation
from service.executors.local_pool import LocalPool
from service.executors.protocol import ExecutorAway, ExecutorSettings, Outcome
from service.executors.ray_cluster import RayCluster, driver_environment, probe
from service.executors.ray_driver import advice
from service.executors.ray_settings import RaySettings, ray_of
from service.settings import Settings
from tests.ray_nodes import free_port

FAKES = Path(__file__).parent
SPEC = SessionSpec(ModelSource("folder", "fine", "aa"), DataSource("none", "text", "bb"))
PATIENCE_SECONDS = 120
Make = Callable[..., RayCluster]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes executors whose drivers are fake ones."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setattr(ray_cluster, "DRIVER", "fake_driver")
    monkeypatch.setattr(ray_cluster, "FIRST_PAUSE_SECONDS", 0.05)
    made: list[RayCluster] = []

    def start(address: str = "here:1", patience: float = 60.0, **more: object) -> RayCluster:
        ray = RaySettings(address, patience_seconds=patience)
        settings = ExecutorSettings(2, tmp_path / "logs", "fake_session:FakeSession", ray=ray, **more)
        made.append(RayCluster(settings))
        made[-1].start(SPEC)
        return made[-1]

    yield start
    for executor in made:
        executor.close(0)


def score(layer: str) -> ScoreUnit:
    return ScoreUnit(layer, "w4", ("output_kl",))


def collect(executor: RayCluster, count: int) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(outcomes) < count:
        assert time.monotonic() < deadline, f"only {sorted(outcomes)} came"
        outcomes |= {outcome.key: outcome for outcome in executor.wait(0.5)}
    return outcomes


def test_a_driver_that_dies_costs_what_ran_and_nothing_that_waited(make: Make, tmp_path: Path) -> None:
    told: list[tuple[str, ...]] = []
    executor = make(on_gaps=told.append)
    for layer in ("a", "die:3", "b", "c"):
        executor.submit(layer, score(layer))
    outcomes = collect(executor, 4)
    failure = outcomes.pop("die:3").failure
    assert failure is not None
    assert failure.kind == "worker_crash"
    assert failure.message == (
        "The driver of the Ray cluster must live. Got its end (exit code 3): the cluster fell over"
    )
    assert all(outcome.result is not None for outcome in outcomes.values())
    assert set(told) == {("network not isolated",)}
    executor.submit("d", score("d"))
    assert collect(executor, 1)["d"].result is not None


def test_units_wait_for_a_cluster_that_is_away_until_patience_ends(make: Make) -> None:
    executor = make("nowhere:1", patience=0.5)
    executor.submit("a", score("a"))
    with pytest.raises(ExecutorAway, match=r"Ray must answer at nowhere:1\."):
        collect(executor, 1)
    executor.close(0)
    assert executor.wait(0) == []


def test_a_unit_that_runs_is_waited_for_while_other_slots_have_no_node(make: Make) -> None:
    executor = make(patience=0.1)
    executor.submit("a", score("away:1"))
    assert collect(executor, 1)["a"].result is not None


def test_nothing_is_started_for_no_units(make: Make) -> None:
    executor = make()
    assert executor.wait(0.01) == []
    assert executor.driver_pid is None


def test_closing_keeps_what_ended_within_the_grace(make: Make) -> None:
    executor = make()
    executor.submit("warm", score("warm"))
    collect(executor, 1)
    executor.submit("slow", score("sleep:0.5"))
    executor.close(30)
    (outcome,) = executor.wait(0)
    assert outcome.result is not None
    assert executor.driver_pid is None


def test_closing_does_not_wait_for_a_cluster_that_was_not_there(make: Make) -> None:
    executor = make()
    executor.submit("a", score("sleep:600"))
    executor.close(600)
    assert executor.wait(0) == []
    assert executor.driver_pid is None


def test_it_must_be_started_first(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Call start\(spec\)"):
        RayCluster(ExecutorSettings(1, tmp_path)).submit("a", score("a"))


def test_what_is_written_for_the_runner_is_written_on_its_machine(tmp_path: Path) -> None:
    writing = Isolation(writable=(str(tmp_path),))
    for ray, kind in ((RaySettings("a:1"), LocalPool), (RaySettings("a:1", shared_store=True), RayCluster)):
        assert isinstance(
            make_executor("ray", ExecutorSettings(1, tmp_path, isolation=writing, ray=ray)), kind
        )
    assert isinstance(make_executor("ray", ExecutorSettings(1, tmp_path)), RayCluster)


def test_the_driver_knows_the_token_and_no_secret_of_the_runner() -> None:
    given = {
        "PATH": "/bin",
        "BITPLAN_DATABASE_URL": "x",
        "HF_TOKEN": "y",
        "RAY_AUTH_TOKEN": "old",
        "RAY_AUTH_MODE": "disabled",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    }
    made = driver_environment(RaySettings("a:1", token_file="/run/secrets/ray"), given)
    assert made["RAY_AUTH_MODE"] == "token"
    assert made["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray"
    assert made["RAY_gcs_rpc_server_reconnect_timeout_s"] == "5"
    assert made["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not {"x", "y", "old"} & set(made.values())
    assert driver_environment(RaySettings("a:1"), given)["RAY_AUTH_TOKEN"] == "old"
    assert driver_environment(RaySettings("a:1", auth="disabled"), {})["RAY_AUTH_MODE"] == "disabled"


def test_an_address_where_nothing_answers_says_what_to_start() -> None:
    found = probe(RaySettings(f"127.0.0.1:{free_port()}"))
    assert found["away"].startswith("Ray must answer at 127.0.0.1:")
    assert "(BITPLAN_RAY_ADDRESS)" in found["away"]
    assert "ray start --head --port=6379" in found["away"]


def test_a_machine_without_a_node_is_told_how_to_start_one() -> None:
    error = ConnectionError("Failed to connect to Ray cluster at head:6379")
    error.__cause__ = RuntimeError("No node info found matching attributes: '' when trying to resolve node")
    said = advice(RaySettings("head:6379"), error)
    assert said.startswith("A node of the Ray cluster at head:6379 must run on the runner's machine.")
    assert "`ray start --address=head:6379 --num-cpus=0`" in said
    error.__cause__ = None
    assert "Its token must be that of the cluster (BITPLAN_RAY_TOKEN_FILE" in advice(
        RaySettings("head:6379"), error
    )


@pytest.mark.parametrize("address", ["", "6379", "head:", "head:port", ":6379"])
def test_the_address_is_asked_for(tmp_path: Path, address: str) -> None:
    with pytest.raises(ValueError, match="BITPLAN_RAY_ADDRESS must be host:port of the cluster's head"):
        require_usable(Settings(data_dir=tmp_path, executor="ray", ray_address=address))


def test_a_token_file_must_be_there(tmp_path: Path) -> None:
    chosen = Settings(
        data_dir=tmp_path, executor="ray", ray_address="a:1", ray_token_file=str(tmp_path / "no")
    )
    with pytest.raises(ValueError, match="BITPLAN_RAY_TOKEN_FILE must hold the cluster's token. Got no file"):
        require_usable(chosen)
    (tmp_path / "no").write_text("secret")
    require_usable(chosen)


def test_ray_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'bitplan\[ray\]'"):
        require_usable(Settings(data_dir=tmp_path, executor="ray", ray_address="a:1"))


def test_the_settings_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RAY_ADDRESS": "head:6379",
        "RAY_AUTH": "disabled",
        "RAY_GPUS_PER_WORKER": "0.5",
        "RAY_SHARED_STORE": "true",
        "RAY_PATIENCE_SECONDS": "5",
        "WORKER_MEMORY": "1 GiB",
        "DATA_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(f"BITPLAN_{name}", value)
    made = ray_of(Settings())
    assert made == RaySettings("head:6379", "disabled", "", 0.5, True, 5.0, 2**30)
    assert RaySettings.from_json(made.as_json()) == made
