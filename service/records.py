"""What the database says, as frozen values: the only form in which rows leave `service.db`.

JSON columns are plain dicts and lists; treat them as read-only. Times are aware datetimes in UTC.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from service.access import Scope
from service.states import TERMINAL, InputState, JobKind, JobState, Stage, UploadState, WebhookState

Json = Mapping[str, Any]
HUB = "hub"
"""The kind of source of models that come from a hub."""


@dataclass(frozen=True)
class Cursor:
    """The last row of a page: the next page starts behind it."""

    created_at: datetime
    id: str


@dataclass(frozen=True)
class BlobRecord:
    """One verified file of a tenant: its digest (lowercase hex) and size in bytes."""

    tenant: str
    sha256: str
    size: int
    created_at: datetime


@dataclass(frozen=True)
class UploadRecord:
    """A manifest `[{path, size, sha256}]` that waits for its blobs, or has them all."""

    id: str
    tenant: str
    purpose: str
    manifest: tuple[Json, ...]
    state: UploadState
    created_at: datetime


@dataclass(frozen=True)
class ModelRecord:
    """A model that was sent, and what its verification found."""

    id: str
    tenant: str
    source: Json
    digest: str
    state: InputState
    problem: Json | None
    summary: Json | None
    created_at: datetime

    @property
    def arrived(self) -> bool:
        """Whether its files are there: those of a hub are not until its runner has fetched them."""
        return self.source.get("kind") != HUB or self.summary is not None

    @property
    def origin(self) -> dict[str, Any] | None:
        """The repository, commit and folder that a model of a hub came from; None for others."""
        if self.source.get("kind") != HUB:
            return None
        return {name: self.source[name] for name in ("repository", "commit", "folder")}


@dataclass(frozen=True)
class CalibrationRecord:
    """A calibration set that was sent; `kind` is safetensors, npz, text or jsonl."""

    id: str
    tenant: str
    source: Json
    digest: str
    kind: str
    state: InputState
    problem: Json | None
    summary: Json | None
    created_at: datetime


@dataclass(frozen=True)
class JobRecord:
    """One job as it stood when it was read; `version` grows with every visible change (the ETag)."""

    id: str
    tenant: str
    kind: JobKind
    state: JobState
    stage: Stage | None
    done: int
    total: int
    eta_seconds: float | None
    request: Json
    request_digest: str
    score_set: str | None
    summary: Json | None
    problem: Json | None
    epoch: int
    lease_owner: str | None
    lease_host: str | None
    lease_pid: int | None
    lease_process: str | None
    lease_expires_at: float | None
    cancel_requested: bool
    predecessor: str | None
    version: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_at: float | None

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL


@dataclass(frozen=True)
class EventRecord:
    """One thing that happened to a job; `seq` counts from 1 without gaps."""

    job_id: str
    seq: int
    type: str
    data: Json
    at: datetime


@dataclass(frozen=True)
class StandingRecord:
    """Where a job stands, for those who wait for it: `version` grows with every visible change, `seq` is the
    number of its last event.
    """

    id: str
    state: JobState
    stage: Stage | None
    done: int
    total: int
    eta_seconds: float | None
    version: int
    seq: int

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL


@dataclass(frozen=True)
class VersionRecord:
    """What decides whether a job has changed for somebody, and whose it is."""

    id: str
    tenant: str
    state: JobState
    version: int

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL


@dataclass(frozen=True)
class WebhookRecord:
    """Who is told of a job's end, and how far that has come; `secret` is None once it is not needed any more.

    `next_attempt_at` is in seconds of the database's own clock.
    """

    id: str
    job_id: str
    url: str
    secret: str | None = field(repr=False)
    state: WebhookState
    attempts: int
    next_attempt_at: float | None
    last_status: int | None
    last_error: str | None
    created_at: datetime
    settled_at: datetime | None


@dataclass(frozen=True)
class ScoreSetRecord:
    """The circumstances under which scores are equal."""

    digest: str
    tenant: str
    settings: Json
    created_at: datetime


@dataclass(frozen=True)
class ScoreRecord:
    """What one (layer, scheme) costs in one metric."""

    score_set: str
    layer: str
    scheme: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    unit_key: str


@dataclass(frozen=True)
class UnitRecord:
    """One finished unit of work; `artifact` is the digest of its arrays in the store, None when it has
    none.
    """

    score_set: str
    key: str
    kind: str
    unit: Json
    facts: Json
    artifact: str | None
    job_id: str | None
    created_at: datetime


@dataclass(frozen=True)
class FaultRecord:
    """A repeated unit that gave another result than the one that was kept."""

    id: str
    score_set: str
    unit_key: str
    kept: Json
    got: Json
    at: datetime


@dataclass(frozen=True)
class AttemptRecord:
    """How often a unit of a job has cost a worker its life."""

    job_id: str
    unit_key: str
    attempts: int
    last_failure: Json


@dataclass(frozen=True)
class RunnerRecord:
    """A runner that has said that it lives, `seconds_ago`; `metrics` are what it has counted, in the text
    format of Prometheus.
    """

    name: str
    host: str
    pid: int
    process: str
    version: str
    started_at: datetime
    seconds_ago: float
    metrics: str

    @property
    def label(self) -> str:
        """A short name: host, process id, and what tells two of these apart."""
        return f"{self.host.partition('/')[0]}:{self.pid}:{self.name[:6]}"


@dataclass(frozen=True)
class Gauges:
    """How much there is at this moment; `jobs` counts by kind and state."""

    jobs: Mapping[tuple[str, str], int]
    oldest_queued_seconds: float
    leases: int
    expired_leases: int
    blobs: int
    blob_bytes: int
    free_bytes: int

    @property
    def queued(self) -> int:
        """Jobs that wait for a runner."""
        return sum(count for (_, state), count in self.jobs.items() if state == JobState.QUEUED)


@dataclass(frozen=True)
class PlanRecord:
    """One solved budget of a job; `document` is None when nothing fits, `evidence` until it was measured."""

    id: str
    tenant: str
    job_id: str
    budget: str
    settings_digest: str
    digest: str | None
    status: str
    document: Json | None
    result: Json
    evidence: Json | None
    created_at: datetime


@dataclass(frozen=True)
class IdempotencyRecord:
    """A remembered request: `status` and `body` are None while the first one is still being answered."""

    tenant: str
    key: str
    request_digest: str
    status: int | None
    body: Json | None
    headers: Mapping[str, str]
    created_at: datetime


@dataclass(frozen=True)
class TenantRecord:
    """Who shares the service; None where the quota is that of the settings, 0 for no limit."""

    name: str
    quota_jobs: int | None
    quota_bytes: int | None
    quota_running: int | None
    created_at: datetime


@dataclass(frozen=True)
class KeyRecord:
    """An API key without its secret: `digest` is the SHA-256 of the whole key, `prefix` its public part."""

    id: str
    tenant: str
    name: str
    scope: Scope
    prefix: str
    digest: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    def state(self, at: datetime) -> str:
        """active, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= at else "active"


@dataclass(frozen=True)
class AuditRecord:
    """One write: `key_id` is None where no key was asked for, `status` None until it was answered."""

    id: str
    tenant: str
    key_id: str | None
    peer: str | None
    action: str
    method: str
    path: str
    request_id: str
    status: int | None
    created_at: datetime
