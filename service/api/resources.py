"""What answers look like: one model per resource, made from the database's records."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from service.records import (
    CalibrationRecord,
    EventRecord,
    JobRecord,
    ModelRecord,
    PlanRecord,
    ScoreRecord,
    UploadRecord,
)

Item = TypeVar("Item")
Json = dict[str, Any]


class Resource(BaseModel):
    """The rules that hold for every answer."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Page(Resource, Generic[Item]):
    """Some items of a list; the next page begins behind `next_cursor`."""

    items: list[Item]
    next_cursor: str | None = Field(None, description="null on the last page.")


class Blob(Resource):
    """A file content that has not arrived."""

    sha256: str
    size: int = Field(description="Bytes.")


class Upload(Resource):
    """Files that become a model or a calibration set when all have arrived."""

    id: str
    purpose: str
    state: str = Field(description="open, complete")
    files: list[Json]
    missing: list[Blob] = Field(description="What to send to /v1/uploads/{id}/blobs/{sha256}.")
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, record: UploadRecord, missing: list[Blob]) -> Upload:
        """From the record and the blobs that have not arrived."""
        return cls(
            id=record.id,
            purpose=record.purpose,
            state=record.state,
            files=[dict(file) for file in record.manifest],
            missing=missing,
            created_at=record.created_at,
            links=_links(f"/v1/uploads/{record.id}", "complete"),
        )


class Model(Resource):
    """A model that was sent."""

    id: str
    state: str = Field(description="verifying, ready, rejected, deleted")
    digest: str = Field(description="SHA-256 over the names and digests of its files.")
    source: Json
    summary: Json | None = Field(description="What the files and, when ready, a worker say about it.")
    problem: Json | None = Field(description="Why it was rejected.")
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, record: ModelRecord) -> Model:
        """From the record."""
        return cls(
            id=record.id,
            state=record.state,
            digest=record.digest,
            source=dict(record.source),
            summary=_summary(record.summary),
            problem=_json(record.problem),
            created_at=record.created_at,
            links=_links(f"/v1/models/{record.id}", "layers"),
        )


class Layers(Resource):
    """What of a model can be quantized, and what was left out and why."""

    layers: list[Json]
    excluded: list[Json]
    total_parameters: int | None = None
    other_bytes: int | None = None


class Calibration(Resource):
    """A calibration set that was sent."""

    id: str
    state: str = Field(description="verifying, ready, rejected, deleted")
    kind: str = Field(description="safetensors, text, jsonl")
    digest: str
    source: Json
    summary: Json | None
    problem: Json | None
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, record: CalibrationRecord) -> Calibration:
        """From the record."""
        return cls(
            id=record.id,
            state=record.state,
            kind=record.kind,
            digest=record.digest,
            source=dict(record.source),
            summary=_json(record.summary),
            problem=_json(record.problem),
            created_at=record.created_at,
            links=_links(f"/v1/calibrations/{record.id}"),
        )


class Progress(Resource):
    """Units of work of the present stage."""

    done: int
    total: int
    eta_seconds: float | None = None


class Job(Resource):
    """A job as it stands."""

    id: str
    kind: str = Field(description="search, verify_model, measure_plan")
    name: str | None = Field(description="As the request has it.")
    labels: dict[str, str]
    state: str = Field(description="queued, running, cancelling, succeeded, failed, cancelled, expired")
    stage: str | None = Field(description="loading, scoring, solving, measuring, packaging")
    progress: Progress
    request: Json
    summary: Json | None
    problem: Json | None = Field(description="Why it failed.")
    score_set: str | None = Field(description="Jobs that name the same score set share its scores.")
    predecessor: str | None = Field(description="The job that this one resumes.")
    cancel_requested: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: dict[str, str]

    @classmethod
    def of(cls, record: JobRecord) -> Job:
        """From the record."""
        return cls(
            id=record.id,
            kind=record.kind,
            name=record.request.get("name"),
            labels=dict(record.request.get("labels") or {}),
            state=record.state,
            stage=record.stage,
            progress=Progress(done=record.done, total=record.total, eta_seconds=record.eta_seconds),
            request=dict(record.request),
            summary=_summary(record.summary),
            problem=_json(record.problem),
            score_set=record.score_set,
            predecessor=record.predecessor,
            cancel_requested=record.cancel_requested,
            created_at=record.created_at,
            started_at=record.started_at,
            finished_at=record.finished_at,
            links=_links(
                f"/v1/jobs/{record.id}", "events", "scores", "plans", "frontier", "cancel", "resume"
            ),
        )


class Event(Resource):
    """One thing that happened to a job; `seq` counts from 1."""

    seq: int
    type: str
    data: Json
    at: datetime

    @classmethod
    def of(cls, record: EventRecord) -> Event:
        """From the record."""
        return cls(seq=record.seq, type=record.type, data=dict(record.data), at=record.at)


class Score(Resource):
    """What one (layer, scheme) costs in one metric."""

    layer: str
    scheme: str
    metric: str
    value: float
    stderr: float | None
    samples: int

    @classmethod
    def of(cls, record: ScoreRecord) -> Score:
        """From the record."""
        return cls(
            layer=record.layer,
            scheme=record.scheme,
            metric=record.metric,
            value=record.value,
            stderr=record.stderr,
            samples=record.samples,
        )


class Plan(Resource):
    """The answer to one budget, with its certificate."""

    model_config = ConfigDict(extra="allow")

    id: str
    job: str
    budget: str
    status: str = Field(description="optimal, feasible, infeasible, unknown")
    metric: str | None = None
    objective: float | None = None
    bound: float | None = None
    gap: float | None = Field(
        None, description="(objective - bound) / max(1e-12, |objective|), sign adjusted."
    )
    source: str | None = Field(None, description="Which candidate this is.")
    candidates: list[Json] = []
    least_budget: Json = Field({}, description="When infeasible: the least budget per limit.")
    resources: Json = {}
    digest: str | None = Field(None, description="SHA-256 of the plan document.")
    document: Json | None = Field(None, description="The plan; null when nothing fits.")
    evidence: Json | None = Field(None, description="Measured quality; null until measured.")
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, record: PlanRecord) -> Plan:
        """From the record."""
        own = {
            "id": record.id,
            "job": record.job_id,
            "budget": record.budget,
            "status": record.status,
            "digest": record.digest,
            "document": _json(record.document),
            "evidence": _json(record.evidence),
            "created_at": record.created_at,
            "links": _links(f"/v1/plans/{record.id}", "document", "measure")
            | {"job": f"/v1/jobs/{record.job_id}"},
        }
        return cls.model_validate({**record.result, **own})


class Plans(Resource):
    """The plans of one re-solve, in the order of the budgets."""

    items: list[Plan]


class FrontierPoint(Resource):
    """One plan that no other beats in both the metric and the resource."""

    objective: float = Field(description="The metric summed over the layers.")
    resources: Json = Field(description="Exact totals, bits_per_weight among them.")
    layers: dict[str, str] | None = Field(None, description="Layer -> scheme, when asked for.")


class Frontier(Resource):
    """Pareto-optimal plans over one resource, the smallest first, predicted from stored scores."""

    resource: str
    metric: str
    items: list[FrontierPoint]


def _json(value: Mapping[str, Any] | None) -> Json | None:
    return None if value is None else dict(value)


def _summary(value: Mapping[str, Any] | None) -> Json | None:
    """Without the inventory, which /v1/models/{id}/layers has and which is long."""
    return None if value is None else {name: item for name, item in value.items() if name != "inventory"}


def _links(path: str, *parts: str) -> dict[str, str]:
    return {"self": path} | {part: f"{path}/{part}" for part in parts}
