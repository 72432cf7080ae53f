"""A service on a temporary SQLite database, small valid inputs, and a runner that only writes rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from quant.layers import Excluded, Inventory, Layer
from sensitivity.units import InspectUnit
from service.app import create_app
from service.db.repositories import jobs, leases, models, plans, score_sets, scores, units
from service.db.repositories.leases import Owner
from service.planning.answer import solve_budget
from service.planning.ask import Ask
from service.records import JobRecord, ScoreRecord
from service.settings import Settings
from service.states import InputState, JobKind, JobState, Stage

OWNER = Owner("fake", "host", 1, "process")
LAYERS = {"a.q": (8, 16), "a.k": (8, 16), "b.up": (16, 32), "b.down": (32, 16)}
CACHE_LOSSES = {"kv-full": 0.0, "kv-int8": 0.01, "kv-int4": 0.1, "kv-fp8_e4m3": 0.02}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}


def safetensors(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def floats(*shape: int, value: float = 0.5) -> tuple[str, list[int], bytes]:
    import struct
    from math import prod

    return "F32", list(shape), struct.pack("<f", value) * prod(shape)


def model_content() -> dict[str, bytes]:
    weights = {f"{name}.weight": floats(*shape) for name, shape in LAYERS.items()}
    return {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors(weights)}


def inventory() -> Inventory:
    layers = tuple(
        Layer(name, "linear", shape, shape, shape[0] * shape[1], shape[0] * shape[1], "other", (), "float32")
        for name, shape in LAYERS.items()
    )
    head = Excluded("lm_head", "linear", 64, "output head: include it with a pattern", ("tied_head",))
    return Inventory(layers, (head,), sum(layer.parameters for layer in layers) + 64, 256)


class Api:
    """The test client with the few steps that most tests begin with."""

    def __init__(self, http: TestClient) -> None:
        self.http = http

    @property
    def context(self) -> Any:
        return self.http.app.state.context

    def manifest(self, files: Mapping[str, bytes], purpose: str = "model") -> dict[str, Any]:
        lines = [
            {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        ]
        return {"purpose": purpose, "files": lines}

    def send(self, files: Mapping[str, bytes], purpose: str = "model") -> dict[str, Any]:
        """Open an upload and send every missing blob; gives the upload."""
        response = self.http.post("/v1/uploads", json=self.manifest(files, purpose))
        assert response.status_code == 201, response.text
        upload: dict[str, Any] = response.json()
        content = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        for blob in upload["missing"]:
            path = f"/v1/uploads/{upload['id']}/blobs/{blob['sha256']}"
            assert self.http.put(path, content=content[blob["sha256"]]).status_code == 204
        return upload

    def complete(self, files: Mapping[str, bytes], purpose: str = "model") -> Any:
        """Send files and complete the upload; gives the response."""
        upload = self.send(files, purpose)
        return self.http.post(f"/v1/uploads/{upload['id']}/complete")

    def model(self) -> str:
        return str(self.complete(model_content()).json()["id"])

    def calibration(self) -> str:
        text = "".join(f"line {number}\n" for number in range(20)).encode()
        return str(self.complete({"calibration.txt": text}, "calibration").json()["id"])

    def request(self, **members: Any) -> dict[str, Any]:
        body = {
            "model": self.model(),
            "calibration": self.calibration(),
            "budgets": ["4 bpw"],
            "schemes": ["w2", "w4", "w8"],
            "interactions": False,
        }
        return body | members

    def submit(self, **members: Any) -> dict[str, Any]:
        response = self.http.post("/v1/jobs", json=self.request(**members))
        assert response.status_code == 202, response.text
        return dict(response.json())


@dataclass
class FakeRunner:
    """Does what the runner does to the database, with invented numbers; `geometry` is a fact of the model."""

    api: Api
    geometry: dict[str, Any] = field(default_factory=dict)

    def verify(self, model_id: str) -> None:
        """Run the queued verification of a model."""
        with self.api.context.database.write() as session:
            job = next(job for job in jobs.unfinished(session) if job.request == {"model": model_id})
            held = leases.claim_job(session, job.id, OWNER, 60)
            assert held is not None
            model = models.get(session, model_id)
            assert model is not None
            summary = {**(model.summary or {}), "inventory": inventory().as_json()} | self.geometry
            models.set_state(session, model_id, InputState.READY, summary=summary)
            leases.finish(session, job.id, held.epoch, JobState.SUCCEEDED)

    def start(self, job_id: str) -> JobRecord:
        with self.api.context.database.write() as session:
            held = leases.claim_job(session, job_id, OWNER, 60)
            assert held is not None
            return leases.progress(session, job_id, held.epoch, stage=Stage.SCORING, done=1, total=10)

    def score(self, job: JobRecord, leave_out: int = 0) -> str:
        """Store a score for every layer, scheme and metric of the job, without the last `leave_out`."""
        digest = hashlib.sha256(str(job.request["model"]).encode()).hexdigest()
        rows = [
            ScoreRecord(
                digest, layer, scheme, metric, value(layer, scheme), 0.001, 8, f"score:{layer}:{scheme}"
            )
            for layer, scheme in (*product(LAYERS, job.request["schemes"]), *self._caches(job))
            for metric in job.request["metrics"]
        ]
        with self.api.context.database.write() as session:
            score_sets.ensure(session, digest, {"seed": job.request["seed"]})
            units.insert(
                session,
                score_set=digest,
                key=InspectUnit().key,
                kind="inspect",
                unit={"unit": "inspect"},
                facts={
                    "inventory": inventory().as_json(),
                    "task": "causal_lm",
                    "available_metrics": ["output_kl", "sqnr", "weight_error"],
                }
                | self.geometry,
                artifact=None,
                job_id=job.id,
            )
            leases.set_score_set(session, job.id, job.epoch, digest)
            scores.insert(session, rows[: len(rows) - leave_out])
        return digest

    def _caches(self, job: JobRecord) -> Iterator[tuple[str, str]]:
        kinds = job.request["kv_cache"]
        layers = self.geometry["geometry"]["attention"] if kinds else ()
        return product(layers, [f"kv-{kind}" for kind in ("full", *kinds)])

    def finish(self, job: JobRecord, state: JobState = JobState.SUCCEEDED, **facts: Any) -> None:
        with self.api.context.database.write() as session:
            leases.finish(session, job.id, job.epoch, state, **facts)

    def run(self, job_id: str) -> None:
        """The whole job: score, plan every budget, succeed."""
        from service.api.job_inputs import planning_inputs

        job = self.start(job_id)
        self.score(job)
        with self.api.context.database.write() as session:
            current = jobs.get(session, job_id)
            assert current is not None
            if current.kind == JobKind.SEARCH:
                inputs = planning_inputs(self.api.context, session, current)
                for budget in current.request["budgets"]:
                    answer = solve_budget(
                        inputs, Ask(budget, tuple(current.request["limits"]), current.request["pins"])
                    )
                    plans.insert(
                        session,
                        job_id=job_id,
                        budget=budget,
                        settings_digest="0" * 64,
                        status=answer.status,
                        digest=answer.plan.digest if answer.plan else None,
                        document=answer.plan.as_json() if answer.plan else None,
                        result=answer.result,
                        evidence={"part": "reporting", "samples": 8, "entries": []},
                    )
        self.finish(job)


def value(layer: str, scheme: str) -> float:
    """An invented loss: less with more bits, the more the later the layer."""
    if scheme in CACHE_LOSSES:
        return CACHE_LOSSES[scheme] * (2 if layer == "b" else 1)
    return (1 + list(LAYERS).index(layer)) * 4.0 ** -int(re.sub(r"w(\d+).*", r"\1", scheme))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", model_folders=(tmp_path / "models",))


@pytest.fixture
def api(settings: Settings) -> Iterator[Api]:
    with TestClient(create_app(settings)) as http:
        yield Api(http)


@pytest.fixture
def make_api() -> Callable[[TestClient], tuple[Api, FakeRunner]]:
    """For a test whose settings are its own."""

    def make(http: TestClient) -> tuple[Api, FakeRunner]:
        api = Api(http)
        return api, FakeRunner(api)

    return make


@pytest.fixture
def runner(api: Api) -> FakeRunner:
    return FakeRunner(api)


@pytest.fixture
def finished_job(api: Api, runner: FakeRunner) -> dict[str, Any]:
    job = api.submit(budgets=["4 bpw", "0.5 bpw"], metrics=["output_kl", "weight_error"])
    runner.run(job["id"])
    return dict(api.http.get(f"/v1/jobs/{job['id']}").json())


@pytest.fixture
def model_files() -> dict[str, bytes]:
    return model_content()


@pytest.fixture
def make_safetensors() -> Callable[..., bytes]:
    return safetensors


@pytest.fixture
def make_floats() -> Callable[..., tuple[str, list[int], bytes]]:
    return floats
