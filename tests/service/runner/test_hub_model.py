"""Models of a hub in the hands of a runner: fetched, verified, ready or rejected with the reason, also after
kill -9.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quant.digest import folder_digest
from service.db.engine import Database
from service.db.repositories import jobs, models, retention, tenants
from service.executors.protocol import ExecutorAway
from service.hub.fetching import partial_id
from service.hub.reference import HubReference
from service.runner.catalog import load_handlers
from service.runner.loop import Runner
from service.settings import Settings
from service.states import InputState, JobKind, JobState, Stage
from service.store.blobs import BlobStore
from tests.service.hub_server import COMMIT, REPOSITORY, Hub, hub_serving, sha256

ROOT = Path(__file__).parents[3]
WANTED = HubReference(REPOSITORY, COMMIT)
SQLITE = pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
PLACES = ("runner.hub_announced", "runner.hub_fetching:3", "runner.hub_arrived", "runner.before_finish")
RUN_ONE = """
from service.db.engine import Database
from service.runner.catalog import load_handlers
from service.runner.loop import Runner
from service.settings import Settings
settings = Settings()
runner = Runner(settings, Database(settings.database_url), load_handlers())
runner.take_back()
runner.run_one()
"""


@dataclass
class Fetched:
    """A model of the hub and its job, as the runner left them."""

    model: Any
    job: Any


@pytest.fixture(scope="module")
def files(tiny: Callable[[str], Any]) -> dict[str, bytes]:
    folder = tiny("resnet").folder
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with hub_serving(files) as hub:
        yield hub


@pytest.fixture
def settings(settings: Settings, hub: Hub) -> Settings:
    return settings.model_copy(update={"hub": True, "hub_offline": False, "hub_endpoint": hub.url})


@pytest.fixture
def ask(database: Database) -> Callable[..., str]:
    """A model that is to be fetched; its id."""

    def create(**request: Any) -> str:
        with database.write() as session:
            source = {"kind": "hub", **WANTED.as_json()}
            model = models.create(session, source=source, digest="0" * 64)
            made = {"model": model.id, **request}
            jobs.create(session, kind=JobKind.VERIFY_MODEL, request=made, request_digest=model.id)
        return str(model.id)

    return create


@pytest.fixture
def run(settings: Settings, database: Database, ask: Callable[..., str]) -> Callable[..., Fetched]:
    def fetch(changes: dict[str, Any] | None = None, **request: Any) -> Fetched:
        ident = ask(**request)
        used = settings.model_copy(update=changes or {})
        job = Runner(used, database, load_handlers()).run_one()
        with database.read() as session:
            return Fetched(models.get(session, ident), job)

    return fetch


def test_a_model_is_fetched_and_verified(
    run: Callable[..., Fetched], settings: Settings, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    found = run()
    assert found.job.state == JobState.SUCCEEDED, found.job.problem
    assert found.model.state == InputState.READY
    content, manifest = folder_digest(tiny("resnet").folder)
    assert found.model.digest == content
    assert found.model.source["files"] == [dict(entry) for entry in manifest]
    assert found.model.origin == WANTED.as_json()
    assert found.model.summary["inventory"]["layers"]
    view = BlobStore(settings.data_dir).view(content)
    assert sorted(path.name for path in view.iterdir()) == [entry["path"] for entry in manifest]
    assert not any(path.is_symlink() for path in view.iterdir())


@SQLITE
def test_progress_is_told(database: Database, settings: Settings, ask: Callable[..., str]) -> None:
    ask()
    seen = []
    Runner(settings, database, load_handlers()).run_one(seen.append)
    fetching = [progress for progress in seen if progress.stage == Stage.FETCHING]
    assert fetching[-1].done == fetching[-1].total > 0


@SQLITE
def test_a_model_that_meets_an_unexpected_error_does_not_wait_for_ever(
    run: Callable[..., Fetched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr("service.runner.verify_job.run_alone", fail)
    found = run()
    assert (found.job.state, found.model.state) == (JobState.FAILED, InputState.REJECTED)
    assert found.model.problem["type"].endswith("internal-error")
    assert "nobody thought of this" in found.model.problem["detail"]


@SQLITE
@pytest.mark.parametrize("away", [OSError(errno.ENOSPC, "full"), ExecutorAway("no head")])
def test_a_model_that_meets_what_passes_by_itself_is_left_to_the_next_runner(
    run: Callable[..., Fetched], database: Database, monkeypatch: pytest.MonkeyPatch, away: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise away

    monkeypatch.setattr("service.runner.verify_job.run_alone", fail)
    with pytest.raises(type(away)):
        run()
    with database.read() as session:
        [job] = jobs.list_kind(session, JobKind.VERIFY_MODEL)
        model = models.get(session, job.request["model"])
    assert model is not None
    assert (job.state, model.state) == (JobState.QUEUED, InputState.VERIFYING)


@SQLITE
@pytest.mark.parametrize(
    ("spoil", "slug", "status"),
    [
        (lambda hub: hub.statuses.append((403, {"X-Error-Code": "GatedRepo"})), "hub-forbidden", 403),
        (lambda hub: hub.files.pop("model.safetensors"), "missing-file", 422),
        (lambda hub: hub.change_body.update({"model.safetensors": b"x"}), "hub-mismatch", 409),
        (lambda hub: hub.files.update({"config.json": b'{"auto_map": {}}'}), "remote-code", 422),
    ],
)
def test_a_bad_one_is_rejected_with_the_reason(
    run: Callable[..., Fetched],
    database: Database,
    settings: Settings,
    hub: Hub,
    spoil: Callable[[Hub], None],
    slug: str,
    status: int,
) -> None:
    spoil(hub)
    found = run()
    assert (found.job.state, found.model.state) == (JobState.FAILED, InputState.REJECTED)
    assert found.job.problem == found.model.problem
    assert found.model.problem["type"].endswith(slug)
    assert found.model.problem["status"] == status
    assert found.model.source["files"] == []
    assert not (settings.data_dir / "partials" / "default" / partial_id(WANTED)).exists()
    with database.read() as session:
        assert tenants.blobs_in_use(session, "default") == {}


@SQLITE
def test_pieces_wait_for_the_next_attempt_where_the_hub_went_away(
    run: Callable[..., Fetched], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.hub.fetching.FIRST_WAIT", 0.0)
    hub.cut["model.safetensors"] = 1000
    monkeypatch.setattr("service.hub.fetching.TRIES", 1)
    monkeypatch.setattr("service.runner.hub_model.Patience", lambda wait, seconds: _impatient(wait))
    assert run().model.problem["type"].endswith("hub-unavailable")
    monkeypatch.undo()
    assert run().model.state == InputState.READY
    assert [headers.get("range") for path, headers in hub.asked if "/cdn/" in path] == [None, "bytes=1000-"]


def _impatient(wait: Callable[[float], None]) -> Any:
    from service.hub.fetching import Patience

    return Patience(wait, tries=1)


@SQLITE
def test_a_runner_without_leave_rejects_it(run: Callable[..., Fetched], hub: Hub) -> None:
    assert run({"hub": False}).model.problem["type"].endswith("hub-not-offered")
    assert run({"hub_offline": True}).model.problem["type"].endswith("hub-offline")
    assert hub.asked == []


@SQLITE
def test_the_quota_is_asked_before_the_weights(run: Callable[..., Fetched], hub: Hub) -> None:
    problem = run({"quota_bytes": "2 KiB"}, quota=True).model.problem
    assert problem["status"] == 507
    assert problem["type"].endswith("too-many-bytes")
    assert not hub.paths("/cdn/")
    assert run({"quota_bytes": "2 KiB"}, quota=False).model.state == InputState.READY


@SQLITE
def test_a_model_on_its_way_is_kept_and_promised_to_nobody(
    database: Database, settings: Settings, ask: Callable[..., str], hub: Hub
) -> None:
    ident, name = ask(), "model.safetensors"
    blob = ("default", sha256(hub.files[name]))
    with database.write() as session:
        source = {"kind": "hub", **WANTED.as_json(), "files": [{"path": name, "size": 1, "sha256": blob[1]}]}
        models.set_source(session, ident, source)
    with database.read() as session:
        assert retention.needed_blobs(session, [blob]) == {blob}
        assert blob not in set(retention.promised_blobs(session))
    with database.write() as session:
        models.set_arrived(session, ident, "1" * 64, {})
    with database.read() as session:
        assert blob in set(retention.promised_blobs(session))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_runner_is_followed_by_one_that_goes_on(
    database: Database, settings: Settings, ask: Callable[..., str], hub: Hub, tmp_path: Path, place: str
) -> None:
    ident = ask()

    def start(failpoints: str) -> int:
        variables = {
            **os.environ,
            **settings.model_copy(update={"workers": 1}).as_environment(),
            "PYTHONPATH": str(ROOT),
            "BITPLAN_FAILPOINTS": failpoints,
        }
        return subprocess.run(
            [sys.executable, "-c", RUN_ONE], env=variables, timeout=300, check=False
        ).returncode

    assert start(f"{place}=kill") == -signal.SIGKILL
    before = len(hub.paths("/cdn/"))
    assert start("") == 0
    with database.read() as session:
        model = models.get(session, ident)
    assert model is not None
    assert model.state == InputState.READY
    if place in ("runner.hub_arrived", "runner.before_finish"):
        assert len(hub.paths("/cdn/")) == before, "what was whole is not fetched again"


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny UNet, in two shards with their index."""
    diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    sides = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    folder = tmp_path_factory.mktemp("unet")
    model = diffusers.UNet2DModel(in_channels=1, out_channels=1, **sides, **blocks)
    model.save_pretrained(folder, max_shard_size="60KB")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@SQLITE
def test_the_folder_of_a_diffusion_pipeline(
    database: Database, settings: Settings, hub: Hub, unet: dict[str, bytes]
) -> None:
    assert len([name for name in unet if name.endswith(".safetensors")]) > 1
    hub.files = {"model_index.json": b"{}"} | {f"unet/{name}": data for name, data in unet.items()}
    with database.write() as session:
        source = {"kind": "hub", **HubReference(REPOSITORY, COMMIT, "unet").as_json()}
        model = models.create(session, source=source, digest="0" * 64)
        made = {"model": model.id}
        jobs.create(session, kind=JobKind.VERIFY_MODEL, request=made, request_digest="r")
    job = Runner(settings, database, load_handlers()).run_one()
    assert job is not None
    assert job.state == JobState.SUCCEEDED, job.problem
    with database.read() as session:
        ready = models.get(session, model.id)
    assert ready is not None
    assert ready.summary is not None
    assert ready.summary["model_type"] == "UNet2DModel"
    assert any("conv" in layer["op"] for layer in ready.summary["inventory"]["layers"])


@SQLITE
def test_a_diffusion_folder_that_was_uploaded(
    database: Database, settings: Settings, unet: dict[str, bytes]
) -> None:
    from fastapi.testclient import TestClient

    from service.app import create_app

    lines = [{"path": name, "size": len(data), "sha256": sha256(data)} for name, data in unet.items()]
    with TestClient(create_app(settings)) as http:
        upload = http.post("/v1/uploads", json={"purpose": "model", "files": lines}).json()
        for name, data in unet.items():
            path = f"/v1/uploads/{upload['id']}/blobs/{sha256(data)}"
            assert http.put(path, content=data).status_code == 204, name
        model = http.post(f"/v1/uploads/{upload['id']}/complete").json()
        assert model["state"] == "verifying", model
        Runner(settings, database, load_handlers()).run_one()
        ready = http.get(f"/v1/models/{model['id']}").json()
        assert (ready["state"], ready["problem"]) == ("ready", None)
        layers = http.get(f"/v1/models/{model['id']}/layers").json()["layers"]
        assert any("conv" in layer["op"] for layer in layers)
