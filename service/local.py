"""The service without HTTP: the same rows, store and runner, driven from one process.

with Local(settings) as local:
    request = local.request(model=local.folder(path), calibration=local.calibration(file), parameters=...)
    job = local.run(request, on_progress)
    local.plans(job.id)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quant.digest import digest, folder_digest
from sensitivity.calibration_check import check_calibration
from sensitivity.evidence import quality_interval
from sensitivity.spec import NO_DATA, ModelSource, SessionSpec
from sensitivity.units import InspectUnit, MeasureUnit, Unit, UnitResult
from service import logs
from service.api.job_resources import Job, Plan
from service.db import migrate
from service.db.engine import Database
from service.db.repositories import calibrations, jobs, models, plans
from service.errors import Unprocessable
from service.executors.catalog import make_executor
from service.executors.protocol import ExecutorSettings, Outcome
from service.ingest.kinds import calibration_kind
from service.ingest.model_folder import check_model
from service.records import CalibrationRecord, JobRecord, ModelRecord
from service.runner.catalog import load_handlers
from service.runner.inputs import session_spec
from service.runner.loop import Runner
from service.runner.problems import problem_of_failure
from service.runner.verify_job import MODEL_CHECK
from service.settings import Settings
from service.states import TERMINAL, InputState, JobKind, JobState
from service.store.blobs import BlobStore
from service.wire import JobRequest

OnJob = Callable[[Mapping[str, Any]], None]
UNFINISHED = frozenset(state for state in JobState if state not in TERMINAL)
WAIT_SECONDS = 0.5


class Local:
    """One data directory, used in this process. The user's files stay where they are."""

    def __init__(self, settings: Settings) -> None:
        logs.configure("warning")
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        migrate.upgrade(settings.database_url)
        self.settings = settings
        self.database = Database(settings.database_url)
        self.store = BlobStore(settings.data_dir)

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    def folder(self, path: Path) -> ModelRecord:
        """The model of a Hugging Face folder of this machine. Raises ServiceError or FolderError."""
        content, manifest = folder_digest(path)
        check_model({entry["path"]: path / entry["path"] for entry in manifest})
        return self._model({"kind": "local", "folder": str(path.absolute())}, content)

    def factory(self, name: str) -> ModelRecord:
        """The model that the user's own function `package.module:function` returns."""
        facts = self._inspect(SessionSpec(ModelSource("factory", name, ""), NO_DATA), MODEL_CHECK)
        return self._model({"kind": "factory", "factory": name}, str(facts["digest"]))

    def calibration(self, path: Path) -> CalibrationRecord:
        """The calibration set of a file, copied into the store. Raises ValueError naming the row."""
        if not path.is_file():
            raise Unprocessable("calibration-not-found", f"--calibration must be a file. Got {str(path)!r}.")
        kind = calibration_kind([path.name])
        summary = check_calibration(path, kind)
        sha256 = self.store.put_file(path)
        source = {"kind": "local", "files": [{"path": path.name, "sha256": sha256}]}
        with self.database.write() as session:
            known = calibrations.find_by_digest(session, sha256)
            if known is not None and known.kind == kind:
                return known
            return calibrations.create(
                session, source=source, digest=sha256, kind=kind, state=InputState.READY, summary=summary
            )

    def request(
        self, model: ModelRecord, calibration: CalibrationRecord, parameters: Mapping[str, Any]
    ) -> JobRequest:
        """A search of these inputs. Raises pydantic's ValidationError, a ValueError."""
        return JobRequest.model_validate({"model": model.id, "calibration": calibration.id, **parameters})

    def spec(self, request: JobRequest, model: ModelRecord, calibration: CalibrationRecord) -> SessionSpec:
        """What a worker measures for this request."""
        return session_spec(request, model, calibration, self.store)

    def inspect(self, spec: SessionSpec) -> Mapping[str, Any]:
        """What one worker sees in model and data, stored nowhere. Raises ServiceError."""
        return self._inspect(spec, self.settings.session_factory)

    def measure(self, spec: SessionSpec, plans: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
        """Divergence and quality of whole plans on all of the data; {} is full precision."""
        units = [MeasureUnit(tuple(plan.items()), "all") for plan in plans]
        results = self._answers(spec, units, self.settings.session_factory)
        return [_intervals(result.arrays) for result in results]

    def run(self, request: JobRequest, on_job: OnJob | None = None) -> JobRecord:
        """Run the search in this process to its end; one that was interrupted goes on where it stopped."""
        job = self._job(request.model_dump(mode="json"))
        runner = Runner(self.settings, self.database, load_handlers())

        def tell(_: object) -> None:
            if on_job is not None:
                on_job(self.job(job.id))

        return runner.run_job(job.id, tell)

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

    def _model(self, source: Mapping[str, Any], content: str) -> ModelRecord:
        with self.database.write() as session:
            for known in models.list_by_digest(session, content):
                if known.source == source:
                    return known
            return models.create(session, source=source, digest=content, state=InputState.READY)

    def _job(self, request: Mapping[str, Any]) -> JobRecord:
        with self.database.write() as session:
            known = jobs.find_by_request(session, digest(request), UNFINISHED)
            return known or jobs.create(
                session, kind=JobKind.SEARCH, request=request, request_digest=digest(request)
            )

    def _inspect(self, spec: SessionSpec, session_factory: str) -> Mapping[str, Any]:
        unit = InspectUnit(spec.include, spec.exclude)
        return self._answers(spec, [unit], session_factory)[0].facts

    def _answers(self, spec: SessionSpec, units: Sequence[Unit], session_factory: str) -> list[UnitResult]:
        """The results of a few units from one worker, stored nowhere."""
        settings = ExecutorSettings(1, self.settings.data_dir / "logs", session_factory)
        executor = make_executor(self.settings.executor, settings)
        executor.start(spec)
        try:
            for unit in units:
                executor.submit(unit.key, unit)
            outcomes: dict[str, Outcome] = {}
            while len(outcomes) < len(units):
                outcomes |= {outcome.key: outcome for outcome in executor.wait(WAIT_SECONDS)}
        finally:
            executor.close(0)
        return [_result(outcomes[unit.key], unit) for unit in units]


def _result(outcome: Outcome, unit: Unit) -> UnitResult:
    if outcome.failure is not None:
        raise problem_of_failure(outcome.failure, unit.as_json())
    assert outcome.result is not None
    return outcome.result


def _intervals(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    found = {name: quality_interval(name, values).as_json() for name, values in arrays.items()}
    return {"divergence": found.pop("divergence"), "quality": found, "samples": len(arrays["divergence"])}


def local_settings(data_dir: Path | None = None, database_url: str = "") -> Settings:
    """Settings of the environment with what the command line says on top."""
    given: dict[str, Any] = {}
    if data_dir is not None:
        given["data_dir"] = data_dir
    if database_url:
        given["database_url"] = database_url
    return Settings(**given)
