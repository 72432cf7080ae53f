"""The service without HTTP: the same rows, store and runner, driven from one process.

with Local(settings) as local:
    request = local.request(local.model(folder_source(path)), local.calibration(file_data(file)), parameters)
    job = local.run(request, on_job)
    local.plans(job.id)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quant.digest import digest, manifest_digest
from sensitivity.spec import ModelSource
from service import logs
from service.api.job_resources import Job, Plan
from service.db import migrate
from service.db.engine import Database
from service.db.repositories import calibrations, jobs, models, plans, uploads
from service.hub.connection import HubConnection
from service.hub.fetching import Patience, announced, fetch
from service.hub.place import place_of
from service.hub.reference import HubReference
from service.ingest.model_folder import check_model
from service.local_inputs import LocalData
from service.records import HUB, CalibrationRecord, JobRecord, ModelRecord
from service.runner.catalog import load_handlers
from service.runner.inputs import model_source
from service.runner.loop import Runner
from service.settings import Settings
from service.states import PENDING, InputState, JobKind, Stage
from service.store.blobs import BlobStore
from service.wire import CorrelationJob, LocalJobRequest

OnJob = Callable[[Mapping[str, Any]], None]


class Local:
    """One data directory, used in this process. The user's model stays where it is."""

    def __init__(self, settings: Settings) -> None:
        logs.configure("warning")
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        migrate.upgrade(settings.database_url)
        self.settings = settings
        self.database = Database(settings.database_url)
        self.store = BlobStore(settings.data_dir)
        self._runner = Runner(settings, self.database, load_handlers())

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    def model(self, source: ModelSource) -> ModelRecord:
        """The row of a model of this machine: a folder, or a factory."""
        fetched = str(self.store.view(source.digest)) if source.kind == "folder" else ""
        place = {"kind": "local", "folder": source.location}
        if source.kind == "factory":
            place = {"kind": "factory", "factory": source.location}
        with self.database.write() as session:
            for known in models.list_by_digest(session, source.digest):
                if known.source == place or (known.source["kind"] == HUB and source.location == fetched):
                    return known
            return models.create(session, source=place, digest=source.digest, state=InputState.READY)

    def hub_model(self, wanted: HubReference, on_job: OnJob = lambda job: None) -> ModelSource:
        """The model of a hub's repository at one commit, fetched unless it is here already; what broke off
        goes on. Raises ServiceError.
        """
        with self.database.read() as session:
            known = models.find_by_source(session, HUB, wanted.as_json())
        if known is None or not known.arrived:  # a server with this data directory may be fetching it
            known = self._fetched(wanted, on_job)
        return model_source(known, self.store)

    def _fetched(self, wanted: HubReference, on_job: OnJob) -> ModelRecord:
        patience, most = Patience(seconds=self.settings.hub_hours * 3600), self.settings.max_upload_bytes

        def tell(done: int, total: int) -> None:
            on_job({"stage": str(Stage.FETCHING), "progress": {"done": done, "total": total}})

        with HubConnection(place_of(self.settings)) as connection:
            found = announced(connection, self.store, wanted, most, patience)
            fetch(connection, self.store, wanted, found.files, patience, tell)
        facts = check_model({file["path"]: self.store.path(file["sha256"]) for file in found.files})
        members = {"files": list(found.files), "left_out": list(found.left_out)}
        with self.database.write() as session:
            for file in found.files:
                uploads.record_blob(session, file["sha256"], file["size"])
            return models.create(
                session,
                source={"kind": HUB, **wanted.as_json(), **members},
                digest=manifest_digest(found.files),
                state=InputState.READY,
                summary=facts.as_json(),
            )

    def calibration(self, data: LocalData) -> CalibrationRecord:
        """The row of a calibration file, which is copied into the store."""
        path = Path(data.source.path)
        sha256, kind = self.store.put_file(path), data.source.kind
        source = {"kind": "local", "files": [{"path": path.name, "sha256": sha256}]}
        with self.database.write() as session:
            known = calibrations.find_by_digest(session, sha256)
            if known is not None and known.kind == kind:
                return known
            return calibrations.create(
                session,
                source=source,
                digest=sha256,
                kind=kind,
                state=InputState.READY,
                summary=data.summary,
            )

    def request(
        self, model: ModelRecord, calibration: CalibrationRecord, parameters: Mapping[str, Any]
    ) -> LocalJobRequest:
        """A search of these inputs; `user_metric`, if given, names a function of the caller's own.

        Raises pydantic's ValidationError, a ValueError.
        """
        return LocalJobRequest.model_validate(
            {"model": model.id, "calibration": calibration.id, **parameters}
        )

    def run(self, request: LocalJobRequest, on_job: OnJob | None = None) -> JobRecord:
        """Run the search in this process to its end; one that was interrupted goes on where it stopped."""
        return self._run(JobKind.SEARCH, request.model_dump(mode="json"), on_job)

    def correlate(self, asked: CorrelationJob, on_job: OnJob | None = None) -> JobRecord:
        """As `run` for correlations; the record's summary is the answer."""
        return self._run(JobKind.CORRELATE, asked.model_dump(mode="json"), on_job)

    def job(self, job_id: str) -> dict[str, Any]:
        """The job's resource, as the API shows it."""
        with self.database.read() as session:
            record = jobs.get(session, job_id)
        assert record is not None
        resource: dict[str, Any] = Job.of(record).model_dump(mode="json")
        return resource

    def plans(self, job_id: str) -> list[dict[str, Any]]:
        """The job's plan resources in the order of its budgets, as the API shows them."""
        with self.database.read() as session:
            return [Plan.of(record).model_dump(mode="json") for record in plans.list_job(session, job_id)]

    def _run(self, kind: JobKind, request: Mapping[str, Any], on_job: OnJob | None) -> JobRecord:
        job = self._job(kind, request)

        def tell(_: object) -> None:
            if on_job is not None:
                on_job(self.job(job.id))

        return self._runner.run_job(job.id, tell)

    def _job(self, kind: JobKind, request: Mapping[str, Any]) -> JobRecord:
        """The job of this request that waits or runs, or a new one."""
        with self.database.write() as session:
            known = jobs.find_by_request(session, digest(request), PENDING)
            return known or jobs.create(session, kind=kind, request=request, request_digest=digest(request))


def local_settings(data_dir: Path | None = None) -> Settings:
    """Settings of the environment, in the data directory of the command line if it names one."""
    return Settings() if data_dir is None else Settings(data_dir=data_dir)
