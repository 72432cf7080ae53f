"""What a worker is kept from, in this machine's way: where something is not isolated, the worker says so."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import ScoreUnit
from service.executors import isolation, landlock, worker_process
from service.executors.confine import Isolation
from service.executors.isolation import isolation_of
from service.executors.local_pool import LocalPool
from service.executors.protocol import ExecutorSettings, Failure
from service.settings import Settings
from service.store.blobs import BlobStore

FAKES = Path(__file__).parent
VIEW = "1" * 64
GIB = 2**30
PATIENCE_SECONDS = 60


class Asking:
    """A pool of one worker, asked one deed at a time."""

    def __init__(self, data: Path, chosen: Isolation, spec: SessionSpec):
        self.gaps: list[tuple[str, ...]] = []
        factory = "curious_session:CuriousSession"
        self.pool = LocalPool(ExecutorSettings(1, data / "logs", factory, chosen, self.gaps.append))
        self.pool.start(spec)

    def __call__(self, deed: str) -> Any:
        """What the deed found, or its failure."""
        self.pool.submit(deed, ScoreUnit(deed, "w4", ("output_kl",)))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (outcomes := self.pool.wait(1)):
            assert time.monotonic() < deadline
        (outcome,) = outcomes
        return outcome.failure if outcome.result is None else outcome.result.facts["found"]

    def gap(self, what: str) -> str:
        """What the worker said that it is not kept from, if that begins with `what`."""
        return next((gap for gaps in self.gaps for gap in gaps if gap.startswith(what)), "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in the store, beside a database and another tenant's blob."""
    store = BlobStore(tmp_path / "data")
    (tmp_path / "data" / "bitplan.db").parent.mkdir(exist_ok=True)
    (tmp_path / "data" / "bitplan.db").write_text("rows")
    return store.materialize([("weights", store.put_bytes(b"weights"))], VIEW)


@pytest.fixture
def start(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Asking]]:
    monkeypatch.syspath_prepend(str(FAKES))
    data, started = tmp_path / "data", []
    spec = SessionSpec(ModelSource("folder", str(model), "aa"), DataSource("", "text", ""))

    def make(**changes: object) -> Asking:
        settings = Settings(
            data_dir=data,
            worker_memory="1 GiB",
            worker_file="1 MiB",
            worker_cpu_hours=0.0001,
            worker_processes=64,
        )
        started.append(Asking(data, replace(isolation_of(settings), **changes), spec))
        return started[-1]

    yield make
    for asking in started:
        asking.pool.close(0)


def failed(found: object) -> str:
    assert isinstance(found, Failure), found
    return f"{found.kind}: {found.message}"


def test_a_curious_model_finds_nothing_and_the_worker_goes_on(
    start: Callable[..., Asking], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_URL", "postgresql://user:password@db/bitplan")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    secret = tmp_path / "log_level"
    secret.write_text("info")
    monkeypatch.setenv("BITPLAN_LOG_LEVEL_FILE", str(secret))
    ask = start()
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = ask(f"connect:{server.getsockname()[1]}")
    gap = ask.gap("network not isolated: ")
    if gap and "TCP is closed by Landlock" not in gap:
        assert found == "connected"
    else:
        assert failed(found).endswith(("Network is unreachable", "Permission denied"))
    if gap:
        assert ask("datagram") == "connected"
    else:
        assert "Network is unreachable" in failed(ask("datagram"))

    environment = " ".join(ask("environment").values())
    assert not [word for word in ("password", "hf_secret") if word in environment]
    assert ask(f"read:{model / 'weights'}") == "weights"
    assert "Permission denied" in failed(ask(f"write:{model / 'weights'}"))
    assert "Permission denied" in failed(ask(f"write:{model / 'new'}"))
    if not ask.gap("files not isolated: "):
        assert "Permission denied" in failed(ask(f"force:{model / 'weights'}"))
        for verb in ("read", "write"):
            assert "Permission denied" in failed(ask(f"{verb}:{tmp_path / 'data' / 'bitplan.db'}"))
            assert "Permission denied" in failed(ask(f"{verb}:{secret}"))
        assert "Permission denied" in failed(ask("parent"))
        if landlock.abi() >= landlock.SIGNALS_ABI:
            assert "not permitted" in failed(ask(f"kill:{os.getpid()}"))
    assert (model / "weights").read_text() == "weights"

    assert ask("grow:1000000") == "grown"
    assert failed(ask("grow:2000000")).startswith(
        "unit_error: Files of a worker must stay within BITPLAN_WORKER_FILE. Got one beyond it: [Errno 27]"
    )
    assert failed(ask(f"allocate:{2 * GIB}")).startswith("out_of_memory: Memory must suffice for the unit.")
    limits = ask("limits")
    assert limits["DATA"] == GIB + len("weights")
    assert (limits["FSIZE"], limits["CORE"]) == (2**20, 0)
    if not ask.gap("network not isolated: "):
        assert limits["NPROC"] == 64
    (pid,) = ask.pool.worker_pids
    ask.pool.close(0)
    assert not Path(f"/proc/{pid}").exists()


def test_a_unit_that_never_ends_costs_its_cpu_time_and_no_other_unit(start: Callable[..., Asking]) -> None:
    ask = start(cpu_seconds=1)
    assert failed(ask("spin")).startswith("unit_error: A unit must end within 1 s of CPU time.")
    assert "TMPDIR" in ask("environment")


def test_where_nobody_may_make_namespaces_workers_say_so_or_do_not_start(
    start: Callable[..., Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "CONFINE", "unprivileged_confine")
    ask = start()
    assert "TMPDIR" in ask("environment")
    assert ask.gap("network not isolated: unshare: Operation not permitted")
    strict = start(mode="require")
    assert failed(strict("environment")).startswith(
        "not_isolated: Workers must be isolated from network and files (BITPLAN_ISOLATION=require)."
        " Got one with: network not isolated: "
    )
    assert [gap.partition(" (")[0] for gap in worker_process.gaps_here()][:1] == [
        "network not isolated: unshare: Operation not permitted"
    ]


def test_temporary_files_of_a_worker_go_with_it(start: Callable[..., Asking]) -> None:
    ask = start()
    own = Path(ask("environment")["TMPDIR"])
    ask("grow:10")
    assert (own / "big").exists()
    ask.pool.close(0)
    assert not own.exists()


def test_all_but_what_is_closed_stays_open(tmp_path: Path) -> None:
    for name in ("a/b/closed/x", "a/open", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b" / "closed")
    (tmp_path / "file").touch()
    found = set(landlock.around([str(tmp_path / "a" / "b" / "closed")], tmp_path))
    assert found == {tmp_path / "a" / "open", tmp_path / "c", tmp_path / "file"}


def test_limits_come_from_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "GPU_FILES", ())
    monkeypatch.setattr(isolation, "CONTAINER_FILES", ())
    data = tmp_path / "data"
    chosen = isolation_of(Settings(data_dir=data, isolation="require"))
    assert chosen.mode == "require"
    assert chosen.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (chosen.file_bytes, chosen.cpu_seconds, chosen.processes) == (2**40, 86400, 1024)
    assert {str(data), str(data / "bitplan.db"), str(data / "bitplan.db-wal")} <= set(chosen.closed)
    assert Isolation.from_json(chosen.as_json()) == chosen
    open_ = Settings(data_dir=data, worker_file="", worker_cpu_hours=0, worker_processes=0)
    none = isolation_of(open_)
    assert (none.file_bytes, none.cpu_seconds, none.processes) == (None, None, None)


def test_the_memory_of_a_container_is_what_it_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "GPU_FILES", ())
    file = tmp_path / "memory.max"
    monkeypatch.setattr(isolation, "CONTAINER_FILES", (str(tmp_path / "none"), str(file)))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for content, expected in (("max\n", machine), (f"{GIB}\n", GIB), (f"{2**63}\n", machine)):
        file.write_text(content)
        assert isolation_of(Settings(data_dir=tmp_path)).memory_bytes == expected


def test_beside_a_gpu_memory_is_limited_on_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "GPU_FILES", (str(tmp_path),))
    assert isolation_of(Settings(data_dir=tmp_path)).memory_bytes is None
    assert isolation_of(Settings(data_dir=tmp_path, worker_memory="1 GiB")).memory_bytes == GIB


def test_a_socket_in_a_covered_folder_is_not_there(start: Callable[..., Asking], tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bs-"))  # paths of sockets must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "s"))
            server.listen()
            ask = start(covered=(str(folder),))
            found = ask(f"knock:{folder / 's'}")
            if not (ask.gap("network not isolated: ") or ask.gap("sockets not covered: ")):
                assert "No such file" in failed(found)
                assert "Read-only file system" in failed(ask(f"write:{folder / 'x'}"))
            assert start()(f"knock:{folder / 's'}") == "connected"
    finally:
        shutil.rmtree(folder)
